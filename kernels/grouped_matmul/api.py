"""Grouped matmul: consecutive groups of rows, each multiplied by a matrix of its own."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxscale.kernels.checks import check_backend, require
from jaxscale.kernels.grouped_matmul import pallas, reference, swiglu
from jaxscale.kernels.grouped_matmul.block_sizes import H200
from jaxscale.kernels.persistent import DEPTH, pad_to_units

BACKENDS = ("reference", "xla", "mosaic")


def grouped_matmul(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    *,
    implementation: str,
    interpret: Any = False,
) -> Array:
    """The rows of group e, which are consecutive, times `weights[e]`.

    Rows past the last group give zero.

    Source: Gale et al. 2022, MegaBlocks (arXiv 2211.15841), section 4: experts without capacity or
        padding.
    Args:
        rows: [rows, D], sorted by group.
        weights: [E, D, F] of the same type.
        group_sizes: [E] int32, their sum at most the number of rows.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs.
        interpret: JAX's parameters of interpretation, to try "mosaic" on a CPU; False compiles it.
    Returns:
        [rows, F] in the type of `rows`, accumulated in at least float32.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: 2 rows D F FLOPs, and as many again for each of the two gradients. "mosaic" fills the rows
        up to a multiple of 8 and D and F to one of 64, by copying.
    """
    _check("grouped_matmul", rows, group_sizes, weights.shape, weights.shape[-1])
    check_backend("grouped_matmul", implementation, BACKENDS, mosaic_refusal(rows, weights))
    if implementation == "reference":
        return reference.grouped_matmul(rows, weights, group_sizes)
    if implementation == "xla":
        return lax.ragged_dot(rows, weights, group_sizes)
    product = _mosaic(_filled(rows), _filled(weights), group_sizes, interpret)
    return product[: rows.shape[0], : weights.shape[2]]


def _check(
    operation: str,
    rows: Array,
    group_sizes: Array,
    weights: tuple[int, ...],
    width: int,
) -> None:
    """Raises ValueError unless rows can be multiplied by matrices of the shape `weights`.

    Matrices that give such rows are checked by their transposed shape.
    """
    fitting = (*group_sizes.shape, rows.shape[-1], width)
    is_fit = rows.ndim == 2 and len(rows) > 0 and weights == fitting
    given = f"rows {rows.shape}, weights {weights} and group_sizes {group_sizes.shape}"
    expected = f"[rows, D], [E, D, {width}] and [E], with a row at least"
    require(is_fit, operation, given, expected)


def mosaic_refusal(rows: Array, weights: Array) -> str | None:
    """What "mosaic" would need to compute the request, as the text of an error.

    None when it can. Shapes and types are enough.
    """
    is_half = rows.dtype in (jnp.bfloat16, jnp.float16)
    if is_half and weights.dtype == rows.dtype:
        return None
    given = f"{rows.dtype} and {weights.dtype}"
    return f"rows and weights both bfloat16 or both float16, but they are {given}"


def _filled(operand: Array) -> Array:
    """Rows [rows, D] or weights [E, D, F] with zeros up to whole tiles.

    A copy where there is something to fill.
    """
    is_rows = operand.ndim == 2
    units = (pallas.ALIGNMENT, DEPTH) if is_rows else (1, DEPTH, DEPTH)
    return pad_to_units(operand, units)


def _kernels(group_sizes: Array, interpret: Any) -> tuple[Callable, Callable]:
    """`pallas.forward` and `pallas.weight_gradient` for these groups."""
    settings = dict(group_sizes=group_sizes, blocks=H200, interpret=interpret)
    multiply = functools.partial(pallas.forward, **settings)
    return multiply, functools.partial(pallas.weight_gradient, **settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mosaic(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    interpret: Any,
) -> Array:
    multiply, _ = _kernels(group_sizes, interpret)
    return multiply((rows,), (weights,), is_transposed=False)


def _forward(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    interpret: Any,
):
    product = _mosaic(rows, weights, group_sizes, interpret)
    return product, (rows, weights, group_sizes)


def _backward(
    interpret: Any,
    residuals: tuple[Array, ...],
    cotangent: Array,
):
    rows, weights, group_sizes = residuals
    multiply, weight_gradient = _kernels(group_sizes, interpret)
    drows = multiply((cotangent,), (weights,), is_transposed=True)
    dweights = weight_gradient(rows, cotangent)
    return drows, dweights, None


_mosaic.defvjp(_forward, _backward)


def feed_forward(
    rows: Array,
    gate: Array,
    up: Array,
    down: Array,
    group_sizes: Array,
    *,
    implementation: str,
    interpret: Any = False,
) -> Array:
    """The SwiGLU feed-forward of each group's expert; rows past the last group give zero.

    "mosaic" computes the products with `gate` and `up`, and SwiGLU of them, in one kernel, and the
    sum of both of their gradients of the rows in another. Between forward and backward it keeps the
    two products [rows, F].

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
    down_turned = down.shape[:-2] + down.shape[:-3:-1]
    for shape in (gate.shape, up.shape, down_turned):
        _check("feed_forward", rows, group_sizes, shape, width)
    refusals = (mosaic_refusal(rows, weights) for weights in (gate, up, down))
    first_refusal = next(filter(None, refusals), None)
    check_backend("feed_forward", implementation, BACKENDS, first_refusal)
    if implementation == "mosaic":
        filled = map(_filled, (rows, gate, up, down))
        y = _mosaic_feed_forward(*filled, group_sizes, interpret)
        return y[: rows.shape[0], : rows.shape[1]]

    def multiply(rows: Array, weights: Array) -> Array:
        return grouped_matmul(rows, weights, group_sizes, implementation=implementation)

    activated = jax.nn.silu(multiply(rows, gate))
    h = activated * multiply(rows, up)
    return multiply(h, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _mosaic_feed_forward(rows, gate, up, down, group_sizes, interpret):
    multiply, _ = _kernels(group_sizes, interpret)
    (h,) = swiglu.forward(
        rows,
        gate,
        up,
        group_sizes,
        is_for_backward=False,
        blocks=H200,
        interpret=interpret,
    )
    return multiply((h,), (down,), is_transposed=False)


def _feed_forward_forward(rows, gate, up, down, group_sizes, interpret):
    multiply, _ = _kernels(group_sizes, interpret)
    h, g, u = swiglu.forward(
        rows,
        gate,
        up,
        group_sizes,
        is_for_backward=True,
        blocks=H200,
        interpret=interpret,
    )
    y = multiply((h,), (down,), is_transposed=False)
    return y, (rows, gate, up, down, group_sizes, g, u)


def _feed_forward_backward(interpret, residuals, dy):
    rows, gate, up, down, group_sizes, g, u = residuals
    multiply, weight_gradient = _kernels(group_sizes, interpret)
    # h is computed again from g and u, so that it need not be kept.
    h, pullback = jax.vjp(swiglu.swiglu, g, u)
    dh = multiply((dy,), (down,), is_transposed=True)
    dg, du = pullback(dh)
    drows = multiply((dg, du), (gate, up), is_transposed=True)
    dgate = weight_gradient(rows, dg)
    dup = weight_gradient(rows, du)
    ddown = weight_gradient(h, dy)
    return drows, dgate, dup, ddown, None


_mosaic_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)
