"""Slots: arrays with a leading dim of places, each of which holds a tensor for some ticks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.parallel.pipeline.liveness import NONE
from jaxscale.types import Array


def read_slot(slots: Any, index: Array | int) -> Any:
    """What is in one slot, of every array of a tree."""

    def one(leaf: Array) -> Array:
        return lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)

    return jax.tree.map(one, slots)


def write_slot(
    slots: Any,
    index: Array,
    values: Any,
) -> Any:
    """Writes to one slot of every array of a tree; for NONE to the last, which nobody reads."""

    def one(leaf: Array, value: Array) -> Array:
        last = leaf.shape[0] - 1
        place = jnp.where(index == NONE, last, index)
        return lax.dynamic_update_index_in_dim(leaf, value, place, 0)

    return jax.tree.map(one, slots, values)


def add(sums: Any, values: Any) -> Any:
    """Adds two trees in the types of `sums`."""

    def one(total: Array, value: Array) -> Array:
        return total + value.astype(total.dtype)

    return jax.tree.map(one, sums, values)


def add_to_slot(
    sums: Any,
    index: Array,
    values: Any,
) -> Any:
    """Adds to one slot of every array of a tree, in the types of `sums`."""

    def one(slots: Array, value: Array) -> Array:
        return slots.at[index].add(value.astype(slots.dtype))

    return jax.tree.map(one, sums, values)


def stacked(shapes: Any, num: int) -> Any:
    """The shapes [num, ...] of so many slots for every shape of a tree."""

    def one(slot: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (num, *slot.shape)
        return jax.ShapeDtypeStruct(shape, slot.dtype)

    return jax.tree.map(one, shapes)


def zeros(shapes: Any, dtype: str | None = None) -> Any:
    """Zeros of every shape of a tree, in its type or in `dtype`."""

    def one(leaf: jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros(leaf.shape, dtype or leaf.dtype)

    return jax.tree.map(one, shapes)


def empty_slots(shapes: Any, num: int) -> Any:
    """So many uninitialised slots for every shape of a tree; each is written before it is read."""

    def one(slots: jax.ShapeDtypeStruct) -> Array:
        return lax.empty(slots.shape, slots.dtype)

    return jax.tree.map(one, stacked(shapes, num))
