"""Mixture-of-experts feed-forward on one device: dropless by sorting, and its slow twin."""

import functools
import logging

import jax
import jax.numpy as jnp

from jaxscale.kernels.grouped_matmul.api import grouped_matmul, mosaic_refusal
from jaxscale.ops.activation import activate
from jaxscale.ops.device import is_hopper
from jaxscale.ops.dispatch import make_dispatch
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, Params

logger = logging.getLogger(__name__)


def experts(x: Array, index: Array, gates: Array, weights: Params, activation: str) -> Array:
    """Sends each token to its experts and returns the gated sum of their outputs; no token is ever dropped.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), equation 1; dropless by sorting as in arXiv 2211.15841.
    Args:
        x: [B, T, D].
        index: [B, T, A] the chosen experts of each token, A experts a token.
        gates: [B, T, A] their weights.
        weights: expert matrices with leading dim E: `up` [E, D, F], `down` [E, F, D], and `gate` when gated.
        activation: name of the feed-forward's activation.
    Returns:
        [B, T, D] in the type of `x`.
    Cost: 6 D F FLOPs a row (gated), B T A rows.
    """
    tokens, choices = x.reshape(-1, x.shape[-1]), index.reshape(-1, index.shape[-1])
    dispatch = make_dispatch(choices, weights["up"].shape[0])
    outputs = grouped_ffn(dispatch.rows(tokens), dispatch.group_sizes, weights, activation)
    return dispatch.combine(outputs, gates.reshape(choices.shape)).reshape(x.shape)


def grouped_ffn(rows: Array, group_sizes: Array, weights: Params, activation: str) -> Array:
    """The feed-forward of expert e on its consecutive `group_sizes[e]` rows; rows past the last group give zero.

    Args:
        rows: [rows, D] sorted by expert.
        group_sizes: [E] int32.
        weights, activation: as in `experts`.
    Returns:
        [rows, D].
    """
    implementation = "mosaic" if is_hopper() and _mosaic_refusal(rows, weights) is None else "xla"
    logger.info("experts: backend %s for rows%s %s", implementation, rows.shape, rows.dtype)
    multiply = functools.partial(grouped_matmul, group_sizes=group_sizes, implementation=implementation)
    gate = multiply(rows, weights["gate"]) if "gate" in weights else None
    return multiply(activate(activation, gate, multiply(rows, weights["up"])), weights["down"])


def _mosaic_refusal(rows: Array, weights: Params) -> str | None:
    """What of the feed-forward our kernel cannot do; None when it can."""
    return mosaic_refusal(rows, weights["up"]) or mosaic_refusal(rows, weights["down"])


def reference(x: Array, index: Array, gates: Array, weights: Params, activation: str) -> Array:
    """The slow twin: every expert on every token, in at least float32; arguments as `experts`."""

    def one(expert: Params) -> Array:
        project = {name: jnp.einsum("btd,df->btf", x32, accumulator(expert[name])) for name in expert if name != "down"}
        hidden = activate(activation, project.get("gate"), project["up"])
        return jnp.einsum("btf,fd->btd", hidden, accumulator(expert["down"]))

    x32 = accumulator(x)
    outputs = jax.vmap(one)(weights)
    chosen = jax.nn.one_hot(index, outputs.shape[0], dtype=x32.dtype)
    return jnp.einsum("btae,bta,ebtd->btd", chosen, accumulator(gates), outputs).astype(x.dtype)
