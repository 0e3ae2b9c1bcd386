"""The slow twin."""

import jax.numpy as jnp
from jax import Array

from jaxscale.kernels.quantised_matmul.packing import INPUTS, unpack


def dequantise(words: Array, scales: Array) -> Array:
    """The matrix [K, N] in float32 of words and scales as `api.matmul` takes them."""
    values = unpack(words).astype(jnp.float32)
    chunks = scales.shape[1]
    by_group = values.reshape(chunks, INPUTS, -1)
    by_output = jnp.moveaxis(scales, 1, 0).reshape(chunks, 1, -1)
    return (by_group * by_output.astype(jnp.float32)).reshape(values.shape)


def matmul(x: Array, words: Array, scales: Array) -> Array:
    """As `api.matmul` of one matrix, in float32."""
    return x.astype(jnp.float32) @ dequantise(words, scales)
