"""Trees whose leaves have names: the keys on the way to a leaf, joined by "/", such as `layers/0/attention/q`."""

import re
from collections.abc import Callable
from typing import Any

import jax

from jaxscale.types import InputError

SEPARATOR = "/"


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves by path, in the tree's order; None is no leaf.

    Raises:
        ValueError: two leaves have the same path, because a key contains "/".
    """
    leaves = [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    flat = dict(leaves)
    if len(flat) != len(leaves):
        names = [name for name, _ in leaves]
        raise ValueError(
            f"two leaves are called {next(name for name in names if names.count(name) > 1)}"
        )
    return flat


def map_with_path(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Maps `function(path, leaf, *leaves of others)` over trees of one structure."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(_name(path), *leaves), tree, *others
    )


def compile_pattern(parameter: str, pattern: str) -> re.Pattern:
    """The regular expression; raises InputError, which names `parameter`, if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(parameter, pattern, f"a regular expression ({error})") from None


def mask(tree: Any, pattern: str) -> Any:
    """The tree with True at each leaf whose whole path matches the regular expression, False elsewhere.

    Raises:
        InputError: `pattern` is no regular expression.
    """
    compiled = compile_pattern("pattern", pattern)
    return map_with_path(lambda path, _: compiled.fullmatch(path) is not None, tree)


def select(tree: Any, pattern: str) -> Any:
    """The tree with None for each leaf whose whole path does not match the regular expression.

    Raises:
        InputError: `pattern` is no regular expression.
    """
    return jax.tree.map(
        lambda leaf, is_selected: leaf if is_selected else None, tree, mask(tree, pattern)
    )


def merge(first: Any, second: Any) -> Any:
    """The leaves of `first`, and those of `second` where `first` has None."""
    return jax.tree.map(
        lambda one, other: other if one is None else one, first, second, is_leaf=lambda x: x is None
    )


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=SEPARATOR)
