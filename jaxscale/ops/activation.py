"""Feed-forward activations."""

import jax

from jaxscale.types import Array

ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu")
UNGATED = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}


def is_gated(activation: str) -> bool:
    """Whether the activation multiplies by a gate."""
    return activation not in UNGATED


def activate(activation: str, gate: Array | None, up: Array) -> Array:
    """SwiGLU silu(gate) * up, GEGLU gelu(gate) * up, or GELU or ReLU of `up` with no gate.

    Source: Shazeer 2020 (arXiv 2002.05202), equation 6; GELU in its tanh form.
    Args:
        activation: one of ACTIVATIONS.
        gate: [..., F], None for "gelu" and "relu".
        up: [..., F].
    Returns:
        [..., F].
    """
    if activation in UNGATED:
        return UNGATED[activation](up)
    if activation == "geglu":
        return jax.nn.gelu(gate) * up
    return jax.nn.silu(gate) * up
