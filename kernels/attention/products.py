"""Products on the tensor cores as both attention kernels use them, and what interpretation lacks of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.persistent import COMPUTE, LOG2E

MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
SWIZZLED_FLOAT32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def interpreted_buffers(interpret: Any, *shapes: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    """Where interpretation puts left operands, one for each warpgroup; a GPU takes them from registers."""
    return tuple(plgpu.SMEM((COMPUTE, *shape), dtype) for shape in shapes) if interpret else ()


def multiply(accumulator: Any, left: jax.Array, right: Any, buffer: Any = None) -> None:
    """Adds left [M, K], from registers, times right [K, N]."""
    if buffer is not None:
        buffer[...] = left
        left = buffer
    plgpu.wgmma(accumulator, left, right)


def accumulate(values: Any, products: Callable, like: Any, *, interpret: Any) -> tuple[Any, Any]:
    """(values + what `products` adds to their accumulators, what it returns); the products have ended then.

    Args:
        values: tuple of float32 arrays.
        products: accumulators -> pytree as `like`.
    """
    if interpret:  # which knows no `run_state`

        def from_zero(*accumulators):
            returned = products(*accumulators)
            return tuple(each[...] for each in accumulators), returned

        sums, returned = pl.run_scoped(from_zero, *(plgpu.ACC(x.shape, x.dtype) for x in values))
        return tuple(x + s for x, s in zip(values, sums, strict=True)), returned

    def add(refs):
        accumulators, others = refs
        for ref, value in zip(
            jax.tree.leaves(others), jax.tree.leaves(products(*accumulators)), strict=True
        ):
            ref[...] = value

    return pl.run_state(add)((tuple(plgpu.ACC.init(x) for x in values), like))


def over_runs(table: Any, step: Callable, carry: Any) -> Any:
    """`step(is_masked, j, carry)` for the tiles j of a row of `tiles`: some, then those seen whole, then the rest."""
    first, end, whole_first, whole_end = table
    for lower, upper, is_masked in (
        (first, whole_first, True),
        (whole_first, whole_end, False),
        (whole_end, end, True),
    ):
        carry = lax.fori_loop(
            lower, upper, lambda j, c, is_masked=is_masked: step(is_masked, j, c), carry
        )
    return carry


def visit_at(entries: Any, num_patterns: int, place: Any, number: Any) -> tuple[Any, Callable]:
    """(tile, warpgroup -> 1 if its block has to do with the tile, else 0) of the `number`-th that `place` visits."""
    if not num_patterns:
        return number, lambda warpgroup: 1
    entry = entries[(*place, number)]
    return lax.shift_right_logical(
        entry, 2
    ), lambda warpgroup: lax.shift_right_logical(entry, warpgroup) & 1


def tanh(x: jax.Array) -> jax.Array:
    """To 1e-6; the hardware's own is off by 2^-11 of itself, which at a soft-cap of 50 is 0.01 of a logit of 20."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2E)))


def spread(values: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """A vector along `axis` of a matrix."""
    return lax.broadcast_in_dim(values, shape, [axis])


def minus_infinity(size: int) -> jax.Array:
    """[size] of the rows of a matrix."""
    return plgpu.layout_cast(jnp.full((size,), -jnp.inf, jnp.float32), ROW)
