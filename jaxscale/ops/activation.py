"""Feed-forward activations."""

import functools

import jax
import jax.numpy as jnp

from jaxscale.types import Array

ACTIVATIONS = ("swiglu", "geglu", "gegelu", "gelu", "gelu_exact", "relu")
GEGELU_LIMIT = 20.0
UNGATED = {
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


def is_gated(activation: str) -> bool:
    """Whether the activation multiplies by a gate."""
    return activation not in UNGATED


def activate(activation: str, gate: Array | None, up: Array) -> Array:
    """SwiGLU silu(gate) * up, GEGLU gelu(gate) * up, or GELU or ReLU of `up` with no gate.

    "gegelu" is Phi-3-small's: both clamped at 20, GELU in its sigmoid form, and 1 added to `up`.

    Source: Shazeer 2020 (arXiv 2002.05202), equation 6; GELU in its tanh form, but "gelu_exact".
    Args:
        activation: one of ACTIVATIONS.
        gate: [..., F], None without a gate.
        up: [..., F].
    Returns:
        [..., F].
    """
    if activation in UNGATED:
        return UNGATED[activation](up)
    if activation == "gegelu":
        gate = jnp.minimum(gate, GEGELU_LIMIT)
        up = jnp.clip(up, -GEGELU_LIMIT, GEGELU_LIMIT)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    if activation == "geglu":
        return jax.nn.gelu(gate) * up
    return jax.nn.silu(gate) * up
