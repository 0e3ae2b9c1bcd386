"""Grouped matmul: consecutive groups of rows, each times a matrix of its own, and the backends behind it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.checks import check_backend, require
from jaxscale.kernels.grouped_matmul import pallas, reference, swiglu
from jaxscale.kernels.grouped_matmul.block_sizes import H200
from jaxscale.kernels.persistent import DEPTH

BACKENDS = ("reference", "xla", "mosaic")


def grouped_matmul(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: str,
    interpret: Any = False,
) -> jax.Array:
    """The rows of group e, which are consecutive, times `weights[e]`; rows past the last group give zero.

    Source: Gale et al. 2022, MegaBlocks (arXiv 2211.15841), section 4: experts without capacity or
        padding.
    Args:
        rows: [rows, K], sorted by group.
        weights: [E, K, N] of the same type.
        group_sizes: [E] int32, their sum at most the number of rows.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs.
        interpret: JAX's parameters of interpretation, to try "mosaic" on a CPU; False compiles it.
    Returns:
        [rows, N] in the type of `rows`, accumulated in at least float32.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: 2 rows K N FLOPs, as many again for each of the two gradients; "mosaic" fills rows up to a
        multiple of 8 and K and N of 64, by copying.
    """
    _check("grouped_matmul", rows, group_sizes, weights.shape, weights.shape[-1])
    check_backend("grouped_matmul", implementation, BACKENDS, mosaic_refusal(rows, weights))
    if implementation == "mosaic":
        product = _mosaic(_filled(rows), _filled(weights), group_sizes, interpret)
        return product[: rows.shape[0], : weights.shape[2]]
    return {"reference": reference.grouped_matmul, "xla": lax.ragged_dot}[implementation](
        rows, weights, group_sizes
    )


def _check(
    operation: str, rows: jax.Array, group_sizes: jax.Array, weights: tuple[int, ...], width: int
) -> None:
    """`weights` is the shape of matrices that rows are multiplied by or, transposed, that give such rows."""
    is_fit = rows.ndim == 2 and len(rows) and weights == (*group_sizes.shape, rows.shape[1], width)
    given = f"rows {rows.shape}, weights {weights} and group_sizes {group_sizes.shape}"
    require(is_fit, operation, given, f"[rows, K], [E, K, {width}] and [E], with a row at least")


def mosaic_refusal(rows: jax.Array, weights: jax.Array) -> str | None:
    """What of the request "mosaic" cannot do, as the text of an error; None when it can. Shapes are enough."""
    if rows.dtype not in (jnp.bfloat16, jnp.float16) or weights.dtype != rows.dtype:
        return f"rows and weights both bfloat16 or both float16, but they are {rows.dtype} and {weights.dtype}"
    return None


def _filled(operand: jax.Array) -> jax.Array:
    """Rows [rows, K] or weights [E, K, N] with zeros up to whole tiles; a copy where there is something to fill."""
    units = (pallas.ALIGNMENT, DEPTH) if operand.ndim == 2 else (1, DEPTH, DEPTH)
    return jnp.pad(
        operand, [(0, -size % unit) for size, unit in zip(operand.shape, units, strict=True)]
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mosaic(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, interpret: Any
) -> jax.Array:
    settings = dict(blocks=H200, interpret=interpret)
    return pallas.forward((rows,), (weights,), group_sizes, is_transposed=False, **settings)


def _forward(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, interpret: Any):
    return _mosaic(rows, weights, group_sizes, interpret), (rows, weights, group_sizes)


def _backward(interpret: Any, arguments: tuple[jax.Array, ...], cotangent: jax.Array):
    rows, weights, group_sizes = arguments
    settings = dict(blocks=H200, interpret=interpret)
    drows = pallas.forward((cotangent,), (weights,), group_sizes, is_transposed=True, **settings)
    return drows, pallas.weight_gradient(rows, cotangent, group_sizes, **settings), None


_mosaic.defvjp(_forward, _backward)


def feed_forward(
    rows: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: str,
    interpret: Any = False,
) -> jax.Array:
    """The SwiGLU feed-forward of each group's expert; rows past the last group give zero.

    "mosaic" makes `gate`'s and `up`'s products and SwiGLU of them in one kernel, and one sum of
    both of their gradients to the rows. Between forward and backward it keeps the two products
    [rows, F].

    Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
    Args:
        rows: [rows, D], sorted by group.
        gate, up: [E, D, F] of the same type.
        down: [E, F, D].
        group_sizes, implementation, interpret: as in `grouped_matmul`.
    Returns:
        [rows, D] in the type of `rows`.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: 6 rows D F FLOPs, twice as many in the backward.
    """
    width = up.shape[-1]
    _check("feed_forward", rows, group_sizes, gate.shape, width)
    _check("feed_forward", rows, group_sizes, up.shape, width)
    _check("feed_forward", rows, group_sizes, (*down.shape[:-2], *down.shape[:-3:-1]), width)
    refusals = (mosaic_refusal(rows, weights) for weights in (gate, up, down))
    check_backend("feed_forward", implementation, BACKENDS, next(filter(None, refusals), None))
    if implementation == "mosaic":
        y = _mosaic_feed_forward(*map(_filled, (rows, gate, up, down)), group_sizes, interpret)
        return y[: rows.shape[0], : rows.shape[1]]
    multiply = functools.partial(
        grouped_matmul, group_sizes=group_sizes, implementation=implementation
    )
    return multiply(jax.nn.silu(multiply(rows, gate)) * multiply(rows, up), down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _mosaic_feed_forward(rows, gate, up, down, group_sizes, interpret):
    settings = dict(blocks=H200, interpret=interpret)
    (h,) = swiglu.forward(rows, gate, up, group_sizes, is_for_backward=False, **settings)
    return pallas.forward((h,), (down,), group_sizes, is_transposed=False, **settings)


def _feed_forward_forward(rows, gate, up, down, group_sizes, interpret):
    settings = dict(blocks=H200, interpret=interpret)
    h, g, u = swiglu.forward(rows, gate, up, group_sizes, is_for_backward=True, **settings)
    y = pallas.forward((h,), (down,), group_sizes, is_transposed=False, **settings)
    return y, (rows, gate, up, down, group_sizes, g, u)


def _feed_forward_backward(interpret, kept, dy):
    rows, gate, up, down, group_sizes, g, u = kept
    settings = dict(blocks=H200, interpret=interpret)
    h, pullback = jax.vjp(swiglu.swiglu, g, u)
    dg, du = pullback(pallas.forward((dy,), (down,), group_sizes, is_transposed=True, **settings))
    drows = pallas.forward((dg, du), (gate, up), group_sizes, is_transposed=True, **settings)
    products = (rows, dg), (rows, du), (h, dy)
    return (
        drows,
        *(pallas.weight_gradient(*both, group_sizes, **settings) for both in products),
        None,
    )


_mosaic_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)
