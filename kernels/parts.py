"""A float32 array as a sum of bfloat16 ones, which matmuls take at their full rate."""

import jax.numpy as jnp
from jax import Array, lax


def parts_of(x: Array, num_parts: int) -> list[Array]:
    """bfloat16 arrays whose sum is `x` in float32 to 8 bits a part; three are all of it."""
    parts = []
    for _ in range(num_parts):
        # XLA may leave out a conversion to bfloat16 and back, but not this.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts
