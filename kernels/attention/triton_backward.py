"""The backward of attention for any NVIDIA GPU since Ampere, of two Triton kernels."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.kernels.attention.triton_key_gradients import key_gradients
from jaxscale.kernels.attention.triton_query_gradient import query_gradient

LOG2E = math.log2(math.e)


def backward(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None,
    dq_dtype: Any,
    layout: BlockLayout | None = None,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """Gradients of q, in `dq_dtype`, and of k and v.

    Args:
        q, k, v, low, high, scale, softcap, layout, interpret: as given to the forward.
        do, lse, delta: as `api.gradients`.
    """
    settings = dict(scale=scale, softcap=softcap, layout=layout, interpret=interpret)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    arguments = q, k, v, do, lse, delta, low, high
    dq = query_gradient(*arguments, **settings, dtype=dq_dtype)
    return dq, *key_gradients(*arguments, **settings)
