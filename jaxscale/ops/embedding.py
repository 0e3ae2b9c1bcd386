"""Rows of a table, such as the embeddings of tokens."""

import functools

import jax
import jax.numpy as jnp

from jaxscale.ops.precision import accumulator
from jaxscale.types import Array


def look_up(table: Array, index: Array) -> Array:
    """The rows [..., D] of a table [V, D] for an index [...] within it.

    The gradient of a row adds up all its occurrences in at least float32, and is rounded once: a
    sum in bfloat16 stands still after 256 equal terms.
    """
    if jnp.finfo(table.dtype).bits >= 32:
        return table[index]
    return _narrow_rows(table, index, len(table))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_rows(table: Array, index: Array, num_rows: int) -> Array:
    return table[index]


def _forward(table: Array, index: Array, num_rows: int) -> tuple[Array, Array]:
    return table[index], index


def _backward(num_rows: int, index: Array, cotangent: Array) -> tuple[Array, None]:
    wide = accumulator(cotangent)
    sums = jnp.zeros((num_rows, wide.shape[-1]), wide.dtype).at[index].add(wide)
    return sums.astype(cotangent.dtype), None


_narrow_rows.defvjp(_forward, _backward)
