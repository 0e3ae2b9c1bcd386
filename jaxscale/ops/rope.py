"""Rotary position embedding."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.ops.precision import accumulator
from jaxscale.types import Array


def rope(x: Array, positions: Array, *, theta: float) -> Array:
    """Rotates pairs (i, i + H/2) of the head dim by positions * theta^(-2i/H).

    Source: Su et al. 2021 (arXiv 2104.09864), equation 34, in the half-split layout of Llama.
    Args:
        x: [B, T, N, H], H even.
        positions: [B, T] integers.
        theta: base of the frequencies.
    Returns:
        [B, T, N, H] in the type of `x`; angles are taken in at least float32.
    """
    half = x.shape[-1] // 2
    pairs = accumulator(x).reshape(*x.shape[:-1], 2, half)
    # In float64 on the host: at position 100,000 the device's power is off by hundredths of a
    # radian.
    frequencies = (theta ** (-np.arange(half) / half)).astype(pairs.dtype)
    angles = positions[..., None, None, None].astype(pairs.dtype) * frequencies
    signs = np.array([[-1], [1]], pairs.dtype)
    # Halves sliced and joined again would become two padded halves, and their sum, in the gradient.
    rotated = pairs * jnp.cos(angles) + lax.rev(pairs, (pairs.ndim - 2,)) * (
        signs * jnp.sin(angles)
    )
    return rotated.reshape(x.shape).astype(x.dtype)
