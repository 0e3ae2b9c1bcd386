"""Matrices of a layer that take one input, joined once for many forwards."""

from typing import Any

import jax

from jaxscale.models.lora import ADAPTER
from jaxscale.ops.linear import Joined
from jaxscale.types import Params

JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def joined(params: Any) -> Any:
    """A tree in which q, k and v are "qkv", and gate and up are "gate_up".

    A matrix that consists of several arrays, such as a quantised one, or that has an adapter beside
    it stays as it is, and so do those that it would be joined with. So do experts.

    Args:
        params: of single layers, in any nest of tuples and dicts.
    """
    if isinstance(params, tuple):
        return tuple(map(joined, params))
    if not isinstance(params, dict):
        return params
    found: Params = {
        name: part if name == "experts" else joined(part) for name, part in params.items()
    }
    for name, parts in JOINED.items():
        is_plain = all(
            isinstance(params.get(part), jax.Array) and f"{part}{ADAPTER}" not in params
            for part in parts
        )
        if is_plain:
            found[name] = Joined.of([found.pop(part) for part in parts])
    return found
