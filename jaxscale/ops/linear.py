"""Where weights meet activations: the one place that knows in which form a weight is stored."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.quantised_matmul import api as kernel
from jaxscale.kernels.quantised_matmul.packing import INPUTS
from jaxscale.ops import by_row
from jaxscale.ops.by_row import ByRow
from jaxscale.ops.device import kernel_family
from jaxscale.ops.quantised import QuantisedMatrix
from jaxscale.types import Array

logger = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix W with a low-rank adapter, for x W + s (x a) b.

    The sum W + s a b is not made: in bfloat16 what the adapter adds below W / 512 would be lost.

    Source: Hu et al. 2021, LoRA (arXiv 2106.09685), equation 3, whose B A is a b here.
    Args:
        matrix: W, [inputs, outputs]; both may be several dims. It may be quantised.
        a: [inputs, R].
        b: [R, outputs].
        scale: s, alpha / r.
    """

    matrix: "Array | QuantisedMatrix"
    a: Array
    b: Array
    scale: float = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selected:
    """A matrix W with several adapters side by side, of which each token has one or none.

    Args:
        matrix: W, [inputs, outputs]; both may be several dims.
        a: [inputs, sum of R].
        b: [sum of R, outputs].
        factors: [B, T, sum of R] what x a is multiplied by: s for the token's own, else 0.
    """

    matrix: Array
    a: Array
    b: Array
    factors: Array


ADAPTED = (Adapted, Selected)
Weights = Array | QuantisedMatrix | Adapted | Selected | ByRow


def linear(equation: str, x: Array, weights: Weights) -> Array:
    """The product of activations and weights.

    Args:
        equation: an einsum of both, such as "btd,df->btf"; the inputs are the last dims of `x` and
            the first ones of the weights.
        x: activations.
        weights: of the type of `x`, or quantised.
    Returns:
        Of the type of `x`.
    """
    return linear_each(equation, x, [weights])[0]


def linear_each(
    equation: str,
    x: Array,
    weights: Sequence[Weights],
) -> list[Array]:
    """The products of activations with several weights, each as `linear`."""
    matrices = _matrices(weights)
    if isinstance(matrices[0], QuantisedMatrix):
        outputs = quantised_products(x, matrices, x.dtype)
    else:
        outputs = [_product(equation, x, each) for each in matrices]
    return _with_adapters(equation, x, weights, outputs)


def _matrices(weights: Sequence[Weights]) -> list[Array | QuantisedMatrix | ByRow]:
    """The weights without their adapters."""
    return [each.matrix if isinstance(each, ADAPTED) else each for each in weights]


def _with_adapters(
    equation: str,
    x: Array,
    weights: Sequence[Weights],
    outputs: list[Array],
) -> list[Array]:
    """The outputs of matrices with what adapters add to them."""
    found = []
    for y, each in zip(outputs, weights, strict=True):
        if isinstance(each, ADAPTED):
            y = y + _low_rank(equation, x, each)
        found.append(y)
    return found


def _product(equation: str, x: Array, weights: Array | ByRow) -> Array:
    """The einsum of both."""
    of_weights, result = equation.split(",")[1].split("->")
    num_inputs = sum(dim not in result for dim in of_weights)
    if isinstance(weights, ByRow):
        return _by_row(x, weights.array, num_inputs)
    depth = math.prod(weights.shape[:num_inputs])
    if jax.default_backend() != "gpu" or x.size != depth:
        return jnp.einsum(equation, x, weights)
    # Of one token and less than 10 million weights XLA would write all products before it adds
    # them, three times the matrix's bytes. Zeros beside the token cost nothing.
    row = x.reshape(1, depth)
    rows = jnp.pad(row, ((0, 7), (0, 0)))
    y = jnp.matmul(rows, weights.reshape(depth, -1))[0]
    lead = x.shape[: x.ndim - num_inputs]
    return y.reshape(*lead, *weights.shape[num_inputs:])


def _by_row(x: Array, matrix: Array, num_inputs: int) -> Array:
    """The product over the first `num_inputs` dims of a matrix, see `ops.by_row`."""
    depth = math.prod(matrix.shape[:num_inputs])
    y = by_row.matmul(x.reshape(-1, depth), matrix.reshape(depth, -1))
    return y.reshape(*x.shape[: x.ndim - num_inputs], *matrix.shape[num_inputs:])


def quantised_products(
    x: Array,
    weights: Sequence[QuantisedMatrix],
    dtype: jnp.dtype,
) -> list[Array]:
    """Products [..., outputs] of x [..., inputs]: of a few tokens by the kernel on Hopper GPUs.

    Of many tokens, the matrices are made whole first.

    Args:
        x: activations.
        weights: with the same inputs.
        dtype: of the products; sums are in at least float32.
    """
    first = weights[0]
    lead = x.shape[: x.ndim - first.num_inputs]
    flat = x.reshape(-1, first.depth)
    is_kernel = has_kernel(flat)
    backend = "mosaic" if is_kernel else "whole matrices"
    logger.info("quantised weights: backend %s for x%s", backend, flat.shape)
    if is_kernel:
        padded = jnp.pad(flat, ((0, 0), (0, -first.depth % INPUTS)))
        matrices = [(each.words, each.scales) for each in weights]
        products = kernel.matmul(padded, matrices, dtype=dtype, implementation="mosaic")
    else:
        whole = [each.whole(x.dtype).reshape(first.depth, -1) for each in weights]
        products = [jnp.matmul(flat, each, preferred_element_type=dtype) for each in whole]
    outputs = []
    for y, each in zip(products, weights, strict=True):
        shape = each.shape[each.num_inputs :]
        outputs.append(y[:, : each.width].reshape(*lead, *shape))
    return outputs


def has_kernel(x: Array, *, is_alone: bool = True) -> bool:
    """Whether products of rows x [M, K] with quantised weights have a kernel here.

    Args:
        x: the rows.
        is_alone: whether nothing is around the products.
    """
    return kernel_family() == "mosaic" and kernel.mosaic_refusal(x, is_alone=is_alone) is None


def products_of_rows(
    x: Array,
    weights: Sequence[QuantisedMatrix],
    *,
    norm: tuple[Array, float] | None = None,
    residual: Array | None = None,
    is_gated: bool = False,
    implementation: str = "mosaic",
) -> list[Array]:
    """Products [M, outputs] of rows x [M, K] with what is around them, in one launch.

    Args:
        x: activations; K is a multiple of `ops.quantised.GROUP`.
        weights: with K inputs.
        norm, residual, is_gated: as of `kernels.quantised_matmul.api.matmul`; the norm's scale and
            epsilon.
        implementation: a backend of it; "mosaic" needs `has_kernel` with `is_alone` false.
    """
    products = kernel.matmul(
        x,
        [(each.words, each.scales) for each in weights],
        norm=None if norm is None else kernel.Norm(*norm),
        residual=residual,
        is_gated=is_gated,
        implementation=implementation,
    )
    return [y[:, : each.width] for y, each in zip(products, weights, strict=False)]


def _low_rank(equation: str, x: Array, weights: Adapted | Selected) -> Array:
    """s (x a) b, whose dims are those of the equation, "r" between the two."""
    operands, result = equation.split("->")
    of_x, of_weights = operands.split(",")
    inputs = "".join(dim for dim in of_weights if dim not in result)
    outputs = "".join(dim for dim in of_weights if dim in result)
    kept = "".join(dim for dim in of_x if dim not in inputs)
    down = f"{of_x},{inputs}r->{kept}r"
    up = f"{kept}r,r{outputs}->{result}"
    h = jnp.einsum(down, x, weights.a)
    is_selected = isinstance(weights, Selected)
    scale = weights.factors.astype(h.dtype) if is_selected else weights.scale
    return jnp.einsum(up, h * scale, weights.b)


def map_outputs(f: Callable[[Array], Array], weights: Weights) -> Weights:
    """The weights with `f` applied to whatever has the dims of the outputs."""
    if isinstance(weights, ByRow):
        return ByRow(f(weights.array))
    if not isinstance(weights, ADAPTED):
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

    weights: Array | ByRow
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, matrices: Sequence[Array | ByRow]) -> "Joined":
        """Joins matrices [D, *shape]."""
        if isinstance(matrices[0], ByRow):
            joined = cls.of([each.array for each in matrices])
            return dataclasses.replace(joined, weights=ByRow(joined.weights))
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
    equation = "btd,dnh->btnh"
    matrices = _matrices(weights)
    if isinstance(matrices[0], QuantisedMatrix):
        return linear_each(equation, x, weights)
    return _with_adapters(equation, x, weights, linear_joined(x, Joined.of(matrices)))
