"""Where weights meet activations: the one place that knows in which form a weight is stored."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from jaxscale.types import Array


def linear(equation: str, x: Array, weights: Array) -> Array:
    """The product of activations and weights.

    Args:
        equation: an einsum of both, such as "btd,df->btf".
        x: activations.
        weights: of the type of `x`.
    Returns:
        Of the type of `x`.
    """
    return jnp.einsum(equation, x, weights)


def linear_heads(x: Array, weights: Sequence[Array]) -> list[Array]:
    """Projections of one input to the heads of several outputs, in one matmul.

    In the backward too there is one matmul for `x` and one for the weights. Of several matmuls the
    gradients of `x` would have to be added up.

    Args:
        x: [B, T, D].
        weights: [D, heads, H] each.
    Returns:
        [B, T, heads, H] each.
    """
    width, head_dim = x.shape[-1], weights[0].shape[-1]
    flat = [w.reshape(width, -1) for w in weights]
    y = linear("btd,df->btf", x, jnp.concatenate(flat, 1))
    outputs = lax.split(y, [w.shape[1] for w in flat], axis=2)
    return [y.reshape(*y.shape[:2], -1, head_dim) for y in outputs]
