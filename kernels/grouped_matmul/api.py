"""Grouped matmul: consecutive groups of rows, each times a matrix of its own, and the backends behind it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.grouped_matmul import pallas, reference
from jaxscale.kernels.grouped_matmul.block_sizes import H200

BACKENDS = ("reference", "xla", "mosaic")


def grouped_matmul(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, implementation: str, interpret: Any = False
) -> jax.Array:
    """The rows of group e, which are consecutive, times `weights[e]`; rows past the last group give zero.

    Source: Gale et al. 2022, MegaBlocks (arXiv 2211.15841), section 4: experts without capacity or padding.
    Args:
        rows: [rows, K], sorted by group.
        weights: [E, K, N] of the same type.
        group_sizes: [E] int32, their sum at most the number of rows.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs.
        interpret: JAX's parameters of interpretation, to try "mosaic" on a CPU; False compiles it.
    Returns:
        [rows, N] in the type of `rows`, accumulated in at least float32.
    Raises:
        ValueError: the backend cannot do what is asked.
    Cost: 2 rows K N FLOPs, as many again for each of the two gradients.
    """
    if implementation == "mosaic":
        if reason := mosaic_refusal(rows, weights):
            raise ValueError(f"grouped_matmul: given 'mosaic', expected {reason}")
        return _mosaic(rows, weights, group_sizes, interpret)
    return {"reference": reference.grouped_matmul, "xla": lax.ragged_dot}[implementation](rows, weights, group_sizes)


def mosaic_refusal(rows: jax.Array, weights: jax.Array) -> str | None:
    """What of the request "mosaic" cannot do, as the text of an error; None when it can. Shapes are enough."""
    if rows.dtype not in (jnp.bfloat16, jnp.float16) or weights.dtype != rows.dtype:
        return f"rows and weights both bfloat16 or both float16, but they are {rows.dtype} and {weights.dtype}"
    if rows.shape[0] % pallas.ALIGNMENT:
        return f"rows % {pallas.ALIGNMENT} == 0, but rows = {rows.shape[0]}"
    for name, size in zip("KN", weights.shape[1:], strict=True):
        if size % pallas.DEPTH:
            return f"{name} % {pallas.DEPTH} == 0, but {name} = {size}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mosaic(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, interpret: Any) -> jax.Array:
    settings = dict(blocks=H200["forward"], interpret=interpret)
    return pallas.forward(rows, weights, group_sizes, is_transposed=False, **settings)


def _forward(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, interpret: Any):
    return _mosaic(rows, weights, group_sizes, interpret), (rows, weights, group_sizes)


def _backward(interpret: Any, arguments: tuple[jax.Array, ...], cotangent: jax.Array):
    rows, weights, group_sizes = arguments
    settings = dict(blocks=H200["input_gradient"], interpret=interpret)
    drows = pallas.forward(cotangent, weights, group_sizes, is_transposed=True, **settings)
    settings = dict(blocks=H200["weight_gradient"], interpret=interpret)
    return drows, pallas.weight_gradient(rows, cotangent, group_sizes, **settings), None


_mosaic.defvjp(_forward, _backward)
