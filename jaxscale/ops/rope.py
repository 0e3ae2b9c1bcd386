"""Rotary position embedding."""

import jax.numpy as jnp
import numpy as np

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
    x32 = accumulator(x)
    # In float64 on the host: at position 100,000 the device's power is off by hundredths of a radian.
    frequencies = (theta ** (-np.arange(half) / half)).astype(x32.dtype)
    angles = positions[..., None, None].astype(x32.dtype) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x32[..., :half], x32[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
