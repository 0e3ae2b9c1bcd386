"""Mixture-of-experts feed-forward on one device: dropless by sorting, and its slow twin."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.activation import activate
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, Params


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
    num_active, num_experts = index.shape[-1], weights["up"].shape[0]
    order = jnp.argsort(index.reshape(-1), stable=True)
    rows = x.reshape(-1, x.shape[-1])[order // num_active]
    group_sizes = jnp.bincount(index.reshape(-1), length=num_experts).astype(jnp.int32)
    y = grouped_ffn(rows, group_sizes, weights, activation)
    weighted = y * gates.reshape(-1)[order][:, None].astype(y.dtype)
    unsorted = jnp.zeros_like(weighted).at[order].set(weighted, unique_indices=True)
    return unsorted.reshape(*x.shape[:-1], num_active, -1).sum(-2)


def grouped_ffn(rows: Array, group_sizes: Array, weights: Params, activation: str) -> Array:
    """The feed-forward of expert e on its consecutive `group_sizes[e]` rows; rows past the last group give zero.

    Args:
        rows: [rows, D] sorted by expert.
        group_sizes: [E] int32.
        weights, activation: as in `experts`.
    Returns:
        [rows, D].
    """
    gate = lax.ragged_dot(rows, weights["gate"], group_sizes) if "gate" in weights else None
    hidden = activate(activation, gate, lax.ragged_dot(rows, weights["up"], group_sizes))
    return lax.ragged_dot(hidden, weights["down"], group_sizes)


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
