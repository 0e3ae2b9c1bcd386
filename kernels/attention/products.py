"""Products on the tensor cores as both attention kernels use them.

A few of them have a second form for interpretation, which lacks what the first form needs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.persistent import COMPUTE, LOG2E

# How a warpgroup's registers hold an accumulator, and a vector along its rows or its columns.
MATRIX = plgpu.Layout.WGMMA
ROW = MATRIX.reduce(1)
COLUMN = MATRIX.reduce(0)


def interpreted_buffers(interpret: Any, *shapes: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    """Shared memory from which interpretation takes left operands, one for each warpgroup.

    A GPU takes them from registers and gets no buffers.
    """
    if not interpret:
        return ()
    return tuple(plgpu.SMEM((COMPUTE, *shape), dtype) for shape in shapes)


def multiply(
    accumulator: Any,
    left: Array,
    right: Any,
    buffer: Any = None,
) -> None:
    """Adds left [rows, depth], from registers, times right [depth, columns]."""
    if buffer is not None:
        buffer[...] = left
        left = buffer
    plgpu.wgmma(accumulator, left, right)


def accumulate(
    values: tuple[Array, ...],
    products: Callable,
    like: Any,
    *,
    interpret: Any,
) -> tuple[Any, Any]:
    """Adds products to values that lie in registers.

    Args:
        values: float32 arrays.
        products: adds to one accumulator a value; accumulators -> pytree as `like`.
        like: arrays of the shapes and types that `products` returns.
        interpret: JAX's parameters of interpretation, or False.
    Returns:
        (values + what was added, what `products` returned); the products have ended by then.
    """
    if interpret:
        return _accumulate_interpreted(values, products)

    def add(refs):
        accumulators, others = refs
        returned = jax.tree.leaves(products(*accumulators))
        for ref, value in zip(jax.tree.leaves(others), returned, strict=True):
            ref[...] = value

    # The accumulators begin with the values, in the same registers.
    accumulators = tuple(plgpu.ACC.init(x) for x in values)
    return pl.run_state(add)((accumulators, like))


def _accumulate_interpreted(
    values: tuple[Array, ...],
    products: Callable,
) -> tuple[Any, Any]:
    """Interpretation knows no `run_state`, so the values are added afterwards."""

    def from_zero(*accumulators):
        returned = products(*accumulators)
        sums = tuple(each[...] for each in accumulators)
        return sums, returned

    accumulators = [plgpu.ACC(x.shape, x.dtype) for x in values]
    sums, returned = pl.run_scoped(from_zero, *accumulators)
    totals = tuple(x + s for x, s in zip(values, sums, strict=True))
    return totals, returned


def over_runs(table: Any, step: Callable, carry: Any) -> Any:
    """Loops `step(is_masked, j, carry)` over the tiles j of one row of a table of `tiles`.

    Tiles that are seen whole lie in one run, which needs no mask; the tiles before it and behind it
    do.
    """
    first, end, whole_first, whole_end = table
    runs = (
        (first, whole_first, True),
        (whole_first, whole_end, False),
        (whole_end, end, True),
    )
    for lower, upper, is_masked in runs:
        carry = lax.fori_loop(lower, upper, functools.partial(step, is_masked), carry)
    return carry


def visit_at(
    entries: Any,
    num_patterns: int,
    place: Any,
    number: Any,
) -> tuple[Any, Callable]:
    """The `number`-th tile that is visited from `place` (row of the table, tile).

    Args:
        entries: the list of `tiles.visits`, if there are patterns.
        num_patterns: those of a block-sparse layout; 0 without one.
    Returns:
        (tile, warpgroup -> 1 if the warpgroup's block sees the tile or is seen by it, else 0).
    """
    if not num_patterns:
        return number, lambda warpgroup: 1
    entry = entries[(*place, number)]
    tile = lax.shift_right_logical(entry, 2)

    def is_seen(warpgroup):
        return lax.shift_right_logical(entry, warpgroup) & 1

    return tile, is_seen


def tanh(x: Array) -> Array:
    """Hyperbolic tangent, exact to 1e-6.

    The hardware's own is off by 2^-11 of the result: at a soft-cap of 50 that is 0.01 of a logit of
    20.
    """
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2E)))


def spread(
    values: Array,
    shape: tuple[int, int],
    axis: int,
) -> Array:
    """Broadcasts a vector along `axis` of a matrix to all of the matrix."""
    return lax.broadcast_in_dim(values, shape, [axis])


def minus_infinity(size: int) -> Array:
    """A vector [size] of -inf along the rows of a matrix."""
    values = jnp.full((size,), -jnp.inf, jnp.float32)
    return plgpu.layout_cast(values, ROW)
