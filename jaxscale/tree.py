"""Trees whose leaves have names: the keys on the way to a leaf, such as `layers/0/attention/q`."""

import re
from collections.abc import Callable
from typing import Any

import jax

from jaxscale.types import InputError

SEPARATOR = "/"


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves by path, in the tree's order; None is no leaf.

    Args:
        tree: any tree.
        is_leaf: what is not taken apart.
    Raises:
        ValueError: two leaves have the same path, because a key contains "/".
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf):
        name = _name(path)
        if name in flat:
            raise ValueError(f"two leaves are called {name}")
        flat[name] = leaf
    return flat


def map_with_path(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Maps `function(path, leaf, *leaves of others)` over trees of one structure."""

    def named(path, *leaves):
        return function(_name(path), *leaves)

    return jax.tree_util.tree_map_with_path(named, tree, *others)


def compile_pattern(parameter: str, pattern: str) -> re.Pattern:
    """The regular expression; raises InputError, which names `parameter`, if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(parameter, pattern, f"a regular expression ({error})") from None


def mask(tree: Any, pattern: str) -> Any:
    """The tree with True where the regular expression matches a leaf's whole path, else False.

    Raises:
        InputError: `pattern` is no regular expression.
    """
    compiled = compile_pattern("pattern", pattern)

    def is_matched(path, _):
        return compiled.fullmatch(path) is not None

    return map_with_path(is_matched, tree)


def select(tree: Any, pattern: str) -> Any:
    """The tree with None for each leaf whose whole path does not match the regular expression.

    Raises:
        InputError: `pattern` is no regular expression.
    """

    def kept(leaf, is_selected):
        return leaf if is_selected else None

    is_selected = mask(tree, pattern)
    return jax.tree.map(kept, tree, is_selected)


def merge(first: Any, second: Any) -> Any:
    """The leaves of `first`, and those of `second` where `first` has None."""

    def is_none(leaf):
        return leaf is None

    def merged(one, other):
        return other if one is None else one

    return jax.tree.map(merged, first, second, is_leaf=is_none)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=SEPARATOR)
