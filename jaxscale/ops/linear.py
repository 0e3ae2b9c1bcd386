"""Where weights meet activations: the one place that knows in which form a weight is stored."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
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


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["shapes"]
)
@dataclasses.dataclass(frozen=True)
class Joined:
    """Matrices that are multiplied by the same input, side by side.

    Args:
        weights: [D, sum of all columns].
        shapes: of the output of each, such as (heads, H).
    """

    weights: Array
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, matrices: Sequence[Array]) -> "Joined":
        """Joins matrices [D, *shape]."""
        flat = [each.reshape(len(each), -1) for each in matrices]
        return cls(jnp.concatenate(flat, 1), tuple(each.shape[1:] for each in matrices))


def linear_joined(x: Array, joined: Joined) -> list[Array]:
    """Products of one input and several matrices, in one matmul.

    In the backward too there is one matmul for `x` and one for the weights. Of several matmuls the
    gradients of `x` would have to be added up.

    Args:
        x: [B, T, D].
        joined: of matrices [D, *shape].
    Returns:
        [B, T, *shape] each.
    """
    y = linear("btd,df->btf", x, joined.weights)
    outputs = lax.split(y, [math.prod(shape) for shape in joined.shapes], axis=2)
    pairs = zip(outputs, joined.shapes, strict=True)
    return [each.reshape(*each.shape[:2], *shape) for each, shape in pairs]
