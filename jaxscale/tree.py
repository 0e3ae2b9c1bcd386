"""Pytrees by path: a leaf's name is its keys joined by "/", such as "layers/0/attention/q"."""

import re
from collections.abc import Callable
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a key path as `jax.tree_util` gives it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """{name: leaf} in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {path_name(path): leaf for path, leaf in leaves}


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Maps f(name, leaf, ...) over a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f(path_name(path), *leaves), tree, *rest, is_leaf=is_leaf
    )


def select(tree: Any, pattern: str, *, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """The tree with None in place of every leaf whose whole name does not match the regular expression."""
    keep = re.compile(pattern)
    return map_with_path(lambda name, leaf: leaf if keep.fullmatch(name) else None, tree, is_leaf=is_leaf)


def merge(chosen: Any, rest: Any) -> Any:
    """The leaves of `chosen`, and those of `rest` where `chosen` has None."""
    return jax.tree.map(lambda c, r: r if c is None else c, chosen, rest, is_leaf=lambda x: x is None)
