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
    heads = linear("btd,dnh->btnh", x, jnp.concatenate(weights, 1))
    return lax.split(heads, [w.shape[1] for w in weights], axis=2)
