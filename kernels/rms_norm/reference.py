"""The slow twin of the norm, whose gradient is JAX's own."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) * scale over the last dim, in at least float32, in the type of `x`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide = x.astype(wide)
    inverse = lax.rsqrt((x_wide * x_wide).mean(-1, keepdims=True) + epsilon)
    return (x_wide * inverse * scale.astype(wide)).astype(x.dtype)
