"""The mixture-of-experts feed-forward: its router's losses and figures, and its experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.models.config import ModelConfig
from jaxscale.models.router import logits_of, route
from jaxscale.ops.draws import EXPERT, Draws, Dropout
from jaxscale.ops.operations import Operations
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, Params


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["balance", "z", "load"], meta_fields=[]
)
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


def router_sums(
    index: Array, logits: Array, weights: Array, config: ModelConfig, operations: Operations
) -> RouterSums:
    """Balance loss E sum_e f_e P_e and z-loss log^2 Z, as sums over own valid tokens.

    f_e is the share of all choices in this micro-batch that fell on expert e, over all devices, and
    is not differentiated; so each token's balance loss is E sum_e f_e p_e and the sum over devices
    equals the single-device loss of as many micro-batches.

    f_e counts the experts that were drawn, p_e is the whole softmax, unmasked; both are of one
    layer.

    Source: Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6; Zoph et al. 2022 (arXiv
        2202.08906), equation 5; over all devices, Liu et al. 2024 (arXiv 2409.12136), section 3.3.
    Args:
        index: [B, T, A]; a number of E or more counts for no expert.
        logits: [B, T, E].
        weights: [B, T], 0 for padding.
    """
    own = operations.own
    index, logits, weights = own(index), own(logits), own(weights)
    chosen = (
        jax.nn.one_hot(index, config.num_experts, dtype=logits.dtype).sum(-2) * weights[..., None]
    )
    load = lax.stop_gradient(chosen.sum((0, 1)))
    total = operations.total(load)
    share = total / jnp.where(total.sum() > 0, total.sum(), 1)
    probabilities = jax.nn.softmax(logits) * weights[..., None]
    balance = config.num_experts * jnp.einsum("e,bte->", share, probabilities)
    z = (jax.nn.logsumexp(logits, -1) ** 2 * weights).sum()
    return RouterSums(config.balance_loss * balance, config.router_z_loss * z, load)


def feed_forward(
    params: Params,
    h: Array,
    weights: Array,
    config: ModelConfig,
    operations: Operations,
    draws: Draws | None = None,
) -> tuple[Array, RouterSums]:
    """Routes each token and applies its experts.

    Args:
        params: the layer's `moe` parameters.
        h: normalised input [B, T, D].
        weights: [B, T], 0 for padding.
        draws: of these tokens in training; None in evaluation and serving.
    Returns:
        (this device's part of the output [B, T, D], the router's sums).
    """
    logits = operations.mark("router", logits_of(params, h))
    index, gates, slopes, is_chosen = route(logits, draws, config)
    dropout = None
    if draws is not None and config.expert_dropout:
        first = operations.first_hidden(params["experts"]["up"].shape[-1])
        dropout = Dropout(draws.streams(EXPERT, index), config.expert_dropout, first)
    y = operations.experts(h, index, gates, params["experts"], config.activation, slopes, dropout)
    if "omega" in params:
        y = (accumulator(y) * accumulator(params["omega"])).astype(y.dtype)
    counted = index if is_chosen is None else jnp.where(is_chosen, index, config.num_experts)
    return y, router_sums(counted, logits, weights, config, operations)
