"""Grouped matmul: consecutive groups of rows, each multiplied by a matrix of its own."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxscale.kernels.checks import check_backend, require
from jaxscale.kernels.grouped_matmul import pallas, reference, swiglu
from jaxscale.kernels.grouped_matmul.block_sizes import H200, NARROW, WIDE_RESULTS
from jaxscale.kernels.persistent import DEPTH, NUM_SMS, TILE_ROWS, BlockSizes, pad_to_units
from jaxscale.kernels.triton_call import missing

BACKENDS = ("reference", "xla", "mosaic", "triton")


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
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs, "triton" for Ampere and newer.
        interpret: JAX's parameters of interpretation, to try a kernel on a CPU; False compiles it.
    Returns:
        [rows, F] in the type of `rows`, accumulated in at least float32.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: 2 rows D F FLOPs, and as many again for each of the two gradients. "mosaic" fills the rows
        up to a multiple of 8 and D and F to one of 64, by copying.
    """
    _check("grouped_matmul", rows, group_sizes, weights.shape, weights.shape[-1])
    reason = refusal(implementation, rows, weights)
    check_backend("grouped_matmul", implementation, BACKENDS, reason)
    if implementation == "reference":
        return reference.grouped_matmul(rows, weights, group_sizes)
    if implementation == "xla":
        return lax.ragged_dot(rows, weights, group_sizes)
    if implementation == "triton":
        return _by_kernel(rows, weights, group_sizes, implementation, interpret)
    filled = _filled(rows), _filled(weights)
    product = _by_kernel(*filled, group_sizes, implementation, interpret)
    return product[: rows.shape[0], : weights.shape[2]]


def matmul(
    rows: Array,
    weights: Array,
    *,
    is_transposed: bool = False,
    dtype: Any = None,
    interpret: Any = False,
) -> Array:
    """The product of rows and a matrix, each row of which has the same bits beside any others.

    Each element is summed over D in one order, by the kernel for Hopper GPUs. Not differentiated.

    Source: He 2025, "Defeating nondeterminism in LLM inference" (Thinking Machines Lab), its
        section on batch-invariant matmuls.
    Args:
        rows: [rows, D].
        weights: [D, F] of the same type; [F, D] where `is_transposed`.
        dtype: of the product, accumulated in float32; None for the type of `rows`.
        interpret: as in `grouped_matmul`.
    Returns:
        [rows, F].
    Raises:
        ValueError: as `grouped_matmul`.
    """
    group_sizes = jnp.full(1, len(rows), jnp.int32)
    shape = weights.shape[::-1] if is_transposed else weights.shape
    _check("matmul", rows, group_sizes, (1, *shape), shape[-1])
    check_backend("matmul", "mosaic", BACKENDS, refusal("mosaic", rows, weights))
    filled, matrix = _filled(rows), _filled(weights[None])
    product = pallas.forward(
        (filled,),
        (matrix,),
        group_sizes,
        is_transposed=is_transposed,
        blocks=WIDE_RESULTS if dtype == jnp.float32 else _blocks_for(len(filled), shape[-1]),
        dtype=dtype,
        interpret=interpret,
    )
    return product[: len(rows), : shape[-1]]


def _blocks_for(num_rows: int, width: int) -> BlockSizes:
    """The widest tiles but for few rows, of which narrow ones keep more multiprocessors busy."""

    def cost(blocks: BlockSizes) -> float:
        num_tiles = -(-num_rows // TILE_ROWS) * -(-width // blocks.columns)
        # The rows are read again for each tile of columns.
        return -(-num_tiles // NUM_SMS) * (blocks.columns + TILE_ROWS / 4)

    return min((H200, *NARROW), key=cost)


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


def refusal(implementation: str, rows: Array, weights: Array) -> str | None:
    """What a kernel would need to compute the request, as the text of an error.

    None when it can, and for what is no kernel. Shapes and types are enough.
    """
    if implementation not in ("mosaic", "triton"):
        return None
    is_half = rows.dtype in (jnp.bfloat16, jnp.float16)
    if not is_half or weights.dtype != rows.dtype:
        given = f"{rows.dtype} and {weights.dtype}"
        return f"rows and weights both bfloat16 or both float16, but they are {given}"
    return missing() if implementation == "triton" else None


def _filled(operand: Array) -> Array:
    """Rows [rows, D] or weights [E, D, F] with zeros up to whole tiles.

    A copy where there is something to fill.
    """
    is_rows = operand.ndim == 2
    units = (pallas.ALIGNMENT, DEPTH) if is_rows else (1, DEPTH, DEPTH)
    return pad_to_units(operand, units)


def _kernels(
    implementation: str,
    group_sizes: Array,
    interpret: Any,
    needs_tail: bool = True,
) -> tuple[Callable, Callable]:
    """`forward` and `weight_gradient` of a backend's module, for these groups."""
    settings = dict(group_sizes=group_sizes, interpret=interpret)
    if implementation == "triton":
        # Triton is optional, so it is imported where it is used.
        from jaxscale.kernels.grouped_matmul import triton

        functions = triton.forward, triton.weight_gradient
    else:
        settings["blocks"] = H200
        multiply = functools.partial(pallas.forward, needs_tail=needs_tail)
        functions = multiply, pallas.weight_gradient
    multiply, weight_gradient = (functools.partial(f, **settings) for f in functions)
    return multiply, weight_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _by_kernel(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    implementation: str,
    interpret: Any,
) -> Array:
    multiply, _ = _kernels(implementation, group_sizes, interpret)
    return multiply((rows,), (weights,), is_transposed=False)


def _forward(
    rows: Array,
    weights: Array,
    group_sizes: Array,
    implementation: str,
    interpret: Any,
):
    product = _by_kernel(rows, weights, group_sizes, implementation, interpret)
    return product, (rows, weights, group_sizes)


def _backward(
    implementation: str,
    interpret: Any,
    residuals: tuple[Array, ...],
    cotangent: Array,
):
    rows, weights, group_sizes = residuals
    multiply, weight_gradient = _kernels(implementation, group_sizes, interpret)
    drows = multiply((cotangent,), (weights,), is_transposed=True)
    dweights = weight_gradient(rows, cotangent)
    return drows, dweights, None


_by_kernel.defvjp(_forward, _backward)


def feed_forward(
    rows: Array,
    gate: Array,
    up: Array,
    down: Array,
    group_sizes: Array,
    *,
    implementation: str,
    needs_tail: bool = True,
    interpret: Any = False,
) -> Array:
    """The SwiGLU feed-forward of each group's expert; rows past the last group give zero.

    "mosaic" computes the products with `gate` and `up`, and SwiGLU of them, in one kernel. It and
    "triton" compute the sum of both of their gradients of the rows in one, and keep the two
    products [rows, F] between forward and backward.

    Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
    Args:
        rows: [rows, D], sorted by group.
        gate, up: [E, D, F] of the same type.
        down: [E, F, D].
        group_sizes, implementation, interpret: as in `grouped_matmul`.
        needs_tail: whether rows past the last group give zero. If not, these rows of the result and
            of the gradient of `rows` are undefined, and "mosaic" spends next to nothing on them.
            They must be finite in `rows` and in the result's cotangent.
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
    refusals = (refusal(implementation, rows, weights) for weights in (gate, up, down))
    first_refusal = next(filter(None, refusals), None)
    check_backend("feed_forward", implementation, BACKENDS, first_refusal)
    if implementation == "triton":
        return _feed_forward(rows, gate, up, down, group_sizes, implementation, True, interpret)
    if implementation == "mosaic":
        filled = map(_filled, (rows, gate, up, down))
        y = _feed_forward(*filled, group_sizes, implementation, needs_tail, interpret)
        return y[: rows.shape[0], : rows.shape[1]]

    def multiply(rows: Array, weights: Array) -> Array:
        return grouped_matmul(rows, weights, group_sizes, implementation=implementation)

    activated = jax.nn.silu(multiply(rows, gate))
    h = activated * multiply(rows, up)
    return multiply(h, down)


def _hidden(implementation, rows, gate, up, group_sizes, interpret, needs_tail, is_for_backward):
    """(h,) or (h, g, u) of a kernel backend: h = silu(g) * u, and the products g and u."""
    if implementation == "mosaic":
        return swiglu.forward(
            rows,
            gate,
            up,
            group_sizes,
            is_for_backward=is_for_backward,
            needs_tail=needs_tail,
            blocks=H200,
            interpret=interpret,
        )
    multiply, _ = _kernels(implementation, group_sizes, interpret)
    g, u = (multiply((rows,), (weights,), is_transposed=False) for weights in (gate, up))
    return swiglu.swiglu(g, u), g, u


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _feed_forward(rows, gate, up, down, group_sizes, implementation, needs_tail, interpret):
    multiply, _ = _kernels(implementation, group_sizes, interpret, needs_tail)
    h, *_ = _hidden(implementation, rows, gate, up, group_sizes, interpret, needs_tail, False)
    return multiply((h,), (down,), is_transposed=False)


def _feed_forward_forward(rows, gate, up, down, group_sizes, implementation, needs_tail, interpret):
    multiply, _ = _kernels(implementation, group_sizes, interpret, needs_tail)
    h, g, u = _hidden(implementation, rows, gate, up, group_sizes, interpret, needs_tail, True)
    y = multiply((h,), (down,), is_transposed=False)
    return y, (rows, gate, up, down, group_sizes, g, u)


def _feed_forward_backward(implementation, needs_tail, interpret, residuals, dy):
    rows, gate, up, down, group_sizes, g, u = residuals
    multiply, weight_gradient = _kernels(implementation, group_sizes, interpret, needs_tail)
    dh = multiply((dy,), (down,), is_transposed=True)
    # h is computed again from g and u, so that it need not be kept.
    if needs_tail:
        h, dg, du = swiglu.backward(g, u, dh)
    else:
        h, dg, du = swiglu.backward_of_some(g, u, dh, group_sizes.sum(), interpret=interpret)
    drows = multiply((dg, du), (gate, up), is_transposed=True)
    dgate = weight_gradient(rows, dg)
    dup = weight_gradient(rows, du)
    ddown = weight_gradient(h, dy)
    return drows, dgate, dup, ddown, None


_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)
