"""The dtype policy: the types in which a run keeps parameters, computes, reduces and returns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.types import Array, InputError, check_choice, check_types

FLOAT_TYPES = ("float64", "float32", "bfloat16", "float16")
# In float16 the square of a gradient below 2e-4 is 0, and Adam then divides by epsilon alone.
OPTIMIZED_TYPES = ("float64", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Names of the floating-point types of a run.

    Args:
        parameters: type of the stored (master) parameters and of the optimizer state; norms,
            biases, routers and value heads, which are few, are stored in at least float32. Not
            float16.
        compute: type of activations, and of the parameters as matmuls see them.
        reduction: type in which gradients are accumulated over micro-batches and summed over
            devices. Not float16.
        output: type of logits returned to a caller (the loss always works in at least float32).
    Raises:
        InputError: a type is unknown, or float64 while JAX computes in float32 instead.
    """

    parameters: str = "float32"
    compute: str = "bfloat16"
    reduction: str = "float32"
    output: str = "float32"

    def __post_init__(self):
        check_types(self)
        for field in dataclasses.fields(self):
            name = f"Policy.{field.name}"
            value = getattr(self, field.name)
            is_optimized = field.name in ("parameters", "reduction")
            check_choice(name, value, OPTIMIZED_TYPES if is_optimized else FLOAT_TYPES)
            if jax.dtypes.canonicalize_dtype(value) != value:
                raise InputError(name, value, "JAX_ENABLE_X64=1 in the environment with it")


def cast(tree: Any, dtype: str) -> Any:
    """Casts the floating-point leaves of a tree to `dtype`; other leaves pass unchanged."""

    def cast_leaf(x: Array) -> Array:
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if is_float else x

    return jax.tree.map(cast_leaf, tree)


def accumulator(x: Array) -> Array:
    """Casts to at least float32, in which norms, softmax and sums are taken; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
