"""The mixture-of-experts feed-forward: the top-k router, its losses and its figures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.models.config import ModelConfig
from jaxscale.ops.operations import Operations
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, Params


@functools.partial(jax.tree_util.register_dataclass, data_fields=["balance", "z", "load"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """Sums over this device's own valid tokens.

    Args:
        balance: [] load-balance loss times tokens, weighted as the configuration says.
        z: [] router z-loss times tokens, weighted.
        load: [E] choices that fell on each expert, not differentiated.
    """

    balance: Array
    z: Array
    load: Array


def no_router(config: ModelConfig) -> RouterSums:
    """The sums of a layer without a router."""
    zero = jnp.zeros((), jnp.float32)
    return RouterSums(zero, zero, jnp.zeros(config.num_experts, jnp.float32))


def route(params: Params, h: Array, config: ModelConfig) -> tuple[Array, Array, Array]:
    """Top-k routing; gates are renormalised over the chosen experts, unless there is only one.

    A single renormalised gate would be 1 and give the router no gradient, so it stays the expert's probability.

    Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 2.2; top-1, Fedus et al. 2021 (arXiv 2101.03961),
        equation 2; without capacity, so nothing is dropped.
    Args:
        params: the layer's `moe` parameters.
        h: [B, T, D].
    Returns:
        index [B, T, A], gates [B, T, A], logits [B, T, E], the last two in at least float32.
    """
    router = accumulator(params["router"])
    logits = jnp.einsum("btd,de->bte", accumulator(h), router, precision=lax.Precision.HIGHEST)
    gates, index = lax.top_k(jax.nn.softmax(logits), config.num_active_experts)
    if config.num_active_experts > 1:
        gates = gates / gates.sum(-1, keepdims=True)
    return index, gates, logits


def router_sums(index: Array, logits: Array, weights: Array, config: ModelConfig, operations: Operations) -> RouterSums:
    """Balance loss E sum_e f_e P_e and z-loss log^2 Z, as sums over own valid tokens.

    f_e is the share of all tokens' choices that fell on expert e, over all devices, and is not differentiated; so
    each token's balance loss is E sum_e f_e p_e and the sum over devices equals the single-device loss.

    Source: Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6; Zoph et al. 2022 (arXiv 2202.08906), equation 5.
    """
    own = operations.own
    index, logits, weights = own(index), own(logits), own(weights)
    chosen = jax.nn.one_hot(index, config.num_experts, dtype=logits.dtype).sum(-2) * weights[..., None]
    load = lax.stop_gradient(chosen.sum((0, 1)))
    total = operations.total(load)
    share = total / jnp.where(total.sum() > 0, total.sum(), 1)
    probabilities = jax.nn.softmax(logits) * weights[..., None]
    balance = config.num_experts * jnp.einsum("e,bte->", share, probabilities)
    z = (jax.nn.logsumexp(logits, -1) ** 2 * weights).sum()
    return RouterSums(config.balance_loss * balance, config.router_z_loss * z, load)


def feed_forward(
    params: Params, h: Array, weights: Array, config: ModelConfig, operations: Operations
) -> tuple[Array, RouterSums]:
    """Routes each token and applies its experts.

    Args:
        params: the layer's `moe` parameters.
        h: normalised input [B, T, D].
        weights: [B, T], 0 for padding.
    Returns:
        (this device's part of the output [B, T, D], the router's sums).
    """
    index, gates, logits = route(params, h, config)
    logits = operations.mark("router", logits)
    y = operations.experts(h, index, gates, params["experts"], config.activation)
    return y, router_sums(index, logits, weights, config, operations)
