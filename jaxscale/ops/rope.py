"""Rotary position embedding."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.ops.precision import accumulator
from jaxscale.types import Array


def rope(
    x: Array,
    positions: Array,
    *,
    theta: float,
) -> Array:
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
    # In float64 on the host. On a device the power is less exact: at position 100,000 the angle
    # would be off by hundredths of a radian.
    frequencies = theta ** (-np.arange(half) / half)
    frequencies = frequencies.astype(pairs.dtype)
    angles = positions[..., None, None, None].astype(pairs.dtype) * frequencies
    signs = np.array([[-1], [1]], pairs.dtype)
    # The two halves change places as one dim is reversed. Sliced and joined again, their gradient
    # would be two padded halves and a sum.
    along = pairs * jnp.cos(angles)
    swapped = lax.rev(pairs, (pairs.ndim - 2,))
    rotated = along + swapped * (signs * jnp.sin(angles))
    return rotated.reshape(x.shape).astype(x.dtype)
