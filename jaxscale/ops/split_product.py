"""Products with a float32 matrix at the speed of bfloat16.

Each operand is a sum of bfloat16 parts, whose products are added up.
"""

import jax
import jax.numpy as jnp

from jaxscale.kernels.parts import parts_of
from jaxscale.types import Array


@jax.custom_vjp
def split_product(x: Array, w: Array) -> Array:
    """x w as in float32: the products of parts are exact and are added up in float32.

    The gradient of `w` is as exact. That of `x` is good to 16 bits before it is rounded to
    bfloat16.

    Source: Henry et al. 2019 (arXiv 1904.06376), section 2.
    Args:
        x: [n, D] bfloat16.
        w: [D, E] float32.
    Returns:
        [n, E] float32.
    Cost: three times the FLOPs of the product in bfloat16; its bytes, for a small E.
    """
    parts = jnp.concatenate(parts_of(w, 3), 1)
    products = jnp.einsum("nd,de->ne", x, parts, preferred_element_type=jnp.float32)
    return _sum_of_parts(products, w.shape[1])


def _sum_of_parts(products: Array, width: int) -> Array:
    """[rows, 3 width] -> [rows, width]; the small parts, which come last, are added first."""
    by_part = products.reshape(products.shape[0], 3, width)
    return by_part[:, ::-1].sum(1)


def _forward(
    x: Array,
    w: Array,
) -> tuple[Array, tuple[Array, Array]]:
    return split_product(x, w), (x, w)


def _backward(
    residuals: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, Array]:
    x, w = residuals
    parts = jnp.concatenate(parts_of(dy, 3), 1)
    products = jnp.einsum("nd,ne->de", x, parts, preferred_element_type=jnp.float32)
    dy_high, dy_low = parts_of(dy, 2)
    w_high, w_low = parts_of(w, 2)
    # The product of the two low parts is left out: it is below the 16 bits.
    left = jnp.concatenate([dy_high, dy_high, dy_low], 1)
    right = jnp.concatenate([w_high, w_low, w_high], 1)
    dx = jnp.einsum("ne,de->nd", left, right)
    return dx, _sum_of_parts(products, w.shape[1])


split_product.defvjp(_forward, _backward)
