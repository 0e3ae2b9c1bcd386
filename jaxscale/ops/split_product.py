"""Products with a float32 matrix at the speed of bfloat16: each operand as a sum of bfloat16 parts."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.types import Array


def parts_of(x: Array, num_parts: int) -> list[Array]:
    """bfloat16 arrays whose sum is `x` in float32 to 8 bits a part; three are all of it."""
    parts = []
    for _ in range(num_parts):
        part = lax.reduce_precision(
            x, exponent_bits=8, mantissa_bits=7
        )  # a conversion and back XLA may leave out
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


@jax.custom_vjp
def split_product(x: Array, w: Array) -> Array:
    """x w as in float32: the products of parts are exact and are added up in float32.

    The gradient of `w` is as exact; that of `x`, which is rounded to bfloat16, is good to 16 bits
    before.

    Source: Henry et al. 2019 (arXiv 1904.06376), section 2.
    Args:
        x: [n, D] bfloat16.
        w: [D, E] float32.
    Returns:
        [n, E] float32.
    Cost: three times the FLOPs of the product in bfloat16; its bytes, for a small E.
    """
    product = jnp.einsum(
        "nd,de->ne", x, jnp.concatenate(parts_of(w, 3), 1), preferred_element_type=jnp.float32
    )
    return product.reshape(x.shape[0], 3, w.shape[1])[:, ::-1].sum(1)  # the small ones first


def _backward(arguments: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = arguments
    dw = jnp.einsum(
        "nd,ne->de", x, jnp.concatenate(parts_of(dy, 3), 1), preferred_element_type=jnp.float32
    )
    (dy_high, dy_low), (w_high, w_low) = parts_of(dy, 2), parts_of(w, 2)
    left, right = (
        jnp.concatenate([dy_high, dy_high, dy_low], 1),
        jnp.concatenate([w_high, w_low, w_high], 1),
    )
    return jnp.einsum("ne,de->nd", left, right), dw.reshape(w.shape[0], 3, w.shape[1])[:, ::-1].sum(
        1
    )


split_product.defvjp(lambda x, w: (split_product(x, w), (x, w)), _backward)
