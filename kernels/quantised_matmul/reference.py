"""The slow twin."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxscale.kernels.quantised_matmul.packing import INPUTS, unpack


def dequantise(words: Array, scales: Array) -> Array:
    """The matrix [K, N] in float32 of words and scales as `api.matmul` takes them."""
    values = unpack(words).astype(jnp.float32)
    chunks = scales.shape[1]
    by_group = values.reshape(chunks, INPUTS, -1)
    by_output = jnp.moveaxis(scales, 1, 0).reshape(chunks, 1, -1)
    return (by_group * by_output.astype(jnp.float32)).reshape(values.shape)


def matmul(
    x: Array,
    matrices: Sequence[tuple[Array, Array]],
    *,
    dtype: Any,
    scale: Array | None,
    epsilon: float,
    residual: Array | None,
    is_gated: bool,
) -> list[Array]:
    """As `api.matmul`, in float32; `scale` and `epsilon` are the norm's."""
    x = x.astype(jnp.float32)
    if scale is not None:
        x = x * lax.rsqrt((x * x).mean(1, keepdims=True) + epsilon) * scale
    outputs = [x @ dequantise(*matrix) for matrix in matrices]
    if is_gated:
        gate, up = outputs
        outputs = [jax.nn.silu(gate) * up]
    if residual is not None:
        outputs = [y + residual for y in outputs]
    return [y.astype(dtype) for y in outputs]
