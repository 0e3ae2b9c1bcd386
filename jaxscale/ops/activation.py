"""Feed-forward activations."""

import jax

from jaxscale.types import Array

ACTIVATIONS = ("swiglu", "geglu", "gelu")


def activate(activation: str, gate: Array | None, up: Array) -> Array:
    """SwiGLU silu(gate) * up, GEGLU gelu(gate) * up, or GELU gelu(up) with no gate.

    Source: Shazeer 2020 (arXiv 2002.05202), equation 6; GELU in its tanh form.
    Args:
        activation: one of ACTIVATIONS.
        gate: [..., F], None for "gelu".
        up: [..., F].
    Returns:
        [..., F].
    """
    if activation == "gelu":
        return jax.nn.gelu(up)
    if activation == "swiglu":
        return jax.nn.silu(gate) * up
    return jax.nn.gelu(gate) * up
