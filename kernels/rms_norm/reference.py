"""The slow twin of the norm beside its residual."""

import jax
import jax.numpy as jnp
from jax import lax


def residual_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """As `api.residual_norm`: (x, x / rms(x) * scale), in at least float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide = x.astype(wide)
    inverse = lax.rsqrt((x_wide * x_wide).mean(-1, keepdims=True) + epsilon)
    return x, (x_wide * inverse * scale.astype(wide)).astype(x.dtype)
