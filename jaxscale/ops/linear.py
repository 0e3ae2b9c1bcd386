"""Where weights meet activations: the one place that knows in which form a weight is stored."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix W with a low-rank adapter, for x W + s (x a) b.

    The sum W + s a b is not made: in bfloat16 what the adapter adds below W / 512 would be lost.

    Source: Hu et al. 2021, LoRA (arXiv 2106.09685), equation 3, whose B A is a b here.
    Args:
        matrix: W, [inputs, outputs]; both may be several dims.
        a: [inputs, R].
        b: [R, outputs].
        scale: s, alpha / r.
    """

    matrix: Array
    a: Array
    b: Array
    scale: float = dataclasses.field(metadata={"static": True})


Weights = Array | Adapted


def linear(equation: str, x: Array, weights: Weights) -> Array:
    """The product of activations and weights.

    Args:
        equation: an einsum of both, such as "btd,df->btf".
        x: activations.
        weights: of the type of `x`.
    Returns:
        Of the type of `x`.
    """
    if not isinstance(weights, Adapted):
        return jnp.einsum(equation, x, weights)
    y = jnp.einsum(equation, x, weights.matrix)
    return y + _low_rank(equation, x, weights)


def _low_rank(equation: str, x: Array, weights: Adapted) -> Array:
    """s (x a) b, whose dims are those of the equation, "r" between the two."""
    operands, result = equation.split("->")
    of_x, of_weights = operands.split(",")
    inputs = "".join(dim for dim in of_weights if dim not in result)
    outputs = "".join(dim for dim in of_weights if dim in result)
    kept = "".join(dim for dim in of_x if dim not in inputs)
    down = f"{of_x},{inputs}r->{kept}r"
    up = f"{kept}r,r{outputs}->{result}"
    h = jnp.einsum(down, x, weights.a)
    return jnp.einsum(up, h * weights.scale, weights.b)


def map_outputs(f: Callable[[Array], Array], weights: Weights) -> Weights:
    """The weights with `f` applied to whatever has the dims of the outputs."""
    if not isinstance(weights, Adapted):
        return f(weights)
    matrix, b = f(weights.matrix), f(weights.b)
    return dataclasses.replace(weights, matrix=matrix, b=b)


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


def linear_heads(x: Array, weights: Sequence[Weights]) -> list[Array]:
    """Projections of one input to the heads of several outputs, in one matmul but for adapters.

    Args:
        x: [B, T, D].
        weights: [D, heads, H] each.
    Returns:
        [B, T, heads, H] each.
    """
    matrices = [w.matrix if isinstance(w, Adapted) else w for w in weights]
    outputs = linear_joined(x, Joined.of(matrices))
    for place, each in enumerate(weights):
        if isinstance(each, Adapted):
            outputs[place] += _low_rank("btd,dnh->btnh", x, each)
    return outputs
