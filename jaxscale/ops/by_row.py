"""Operations of single tokens whose bits depend on the token alone, whatever is beside it.

What `ops.tiles` reaches by products of one shape, these reach by sums in one order: matmuls by our
kernel for Hopper GPUs, and sums written out as additions, of which XLA changes none.

Source: He 2025, "Defeating nondeterminism in LLM inference" (Thinking Machines Lab).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxscale.kernels.grouped_matmul import api as kernel
from jaxscale.types import Array

# Names products, for rematerialisation policies.
PRODUCT = "product_by_row"
FAN_IN = 64  # numbers that are added in one pass over memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByRow:
    """A matrix or a norm's scale whose results for a token are to have the same bits beside others.

    Args:
        array: in the type in which it is used.
    """

    array: Array


def with_gradients_of(standard: Callable) -> Callable:
    """Decorates a function that computes the same as `standard` in another order of sums.

    The gradients are those of `standard`, at the same arguments.
    """

    def decorate(f: Callable) -> Callable:
        def forward(*arguments: Any) -> tuple[Any, tuple]:
            return f(*arguments), arguments

        def backward(arguments: tuple, cotangents: Any) -> Any:
            _, pullback = jax.vjp(standard, *arguments)
            return pullback(cotangents)

        decorated = jax.custom_vjp(f)
        decorated.defvjp(forward, backward)
        return decorated

    return decorate


@with_gradients_of(jnp.matmul)
def matmul(rows: Array, matrix: Array) -> Array:
    """The product of rows [n, D] and a matrix [D, F], in bfloat16 or float16, on a Hopper GPU."""
    return checkpoint_name(kernel.matmul(rows, matrix), PRODUCT)


def project(rows: Array, matrix: Array) -> Array:
    """Logits [n, V] in float32 of rows [n, D] and a matrix [V, D]; not differentiated."""
    return kernel.matmul(rows, matrix, is_transposed=True, dtype=jnp.float32)


def total(x: Array) -> Array:
    """The sum over the last dim, in an order that depends on its size alone."""
    while x.shape[-1] > 1:
        parts = min(FAN_IN, x.shape[-1])
        padding = -x.shape[-1] % parts
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
        terms = jnp.split(x, parts, axis=-1)
        while len(terms) > 1:
            pairs = zip(terms[::2], terms[1::2], strict=False)
            odd = terms[len(terms) // 2 * 2 :]
            terms = [a + b for a, b in pairs] + odd
        x = terms[0]
        if x.shape[-1] > 1:  # or the next pass would add up again for each of its elements
            x = lax.optimization_barrier(x)
    return x[..., 0]


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """As `kernels.rms_norm.reference.rms_norm`; not differentiated."""
    x = lax.optimization_barrier(x)  # as it is rounded
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide = x.astype(wide)
    mean_square = total(x_wide * x_wide)[..., None] / x.shape[-1]
    inverse = lax.optimization_barrier(lax.rsqrt(mean_square + epsilon))
    return (x_wide * inverse * scale.astype(wide)).astype(x.dtype)


@functools.cache
def norm_with_gradients_of(standard: Callable, epsilon: float) -> Callable:
    """(x, scale) -> what `standard(x, scale, epsilon)` returns: the norm, or `x` and the norm."""

    def of_standard(x: Array, scale: Array) -> Any:
        return standard(x, scale, epsilon=epsilon)

    @with_gradients_of(of_standard)
    def norm(x: Array, scale: Array) -> Any:
        y = rms_norm(x, scale, epsilon)
        is_pair = isinstance(jax.eval_shape(of_standard, x, scale), tuple)
        return (x, y) if is_pair else y

    return norm
