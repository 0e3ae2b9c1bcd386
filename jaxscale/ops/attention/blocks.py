"""Arrays of tokens cut into blocks of one size, which a loop takes in turn."""

import jax.numpy as jnp
from jax import lax

from jaxscale.types import Array


def padded(
    x: Array,
    axis: int,
    size: int,
    fill: int = 0,
) -> Array:
    """With `fill` behind the tokens of an axis, up to a multiple of a size."""
    margins = [(0, 0)] * x.ndim
    margins[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, margins, constant_values=fill)


def split(
    x: Array,
    axis: int,
    size: int,
    fill: int = 0,
) -> Array:
    """[blocks, ..., size, ...] of an axis of tokens; arguments as `padded`."""
    whole = padded(x, axis, size, fill)
    by_block = whole.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(by_block, axis, 0)


def joined(x: Array, axis: int, length: int) -> Array:
    """What `split` split, or was made of it, of so many tokens."""
    x = jnp.moveaxis(x, 0, axis)
    whole = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(whole, 0, length, axis=axis)
