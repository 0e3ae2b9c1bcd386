"""The mixture-of-experts feed-forward: its experts, and its router's losses and figures."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.models.config import ExpertsConfig
from jaxscale.models.router import route, router_logits
from jaxscale.ops.activation import activate
from jaxscale.ops.backends import Operations
from jaxscale.ops.draws import EXPERT, Draws, Dropout
from jaxscale.ops.linear import linear, linear_each, linear_joined
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


class Choices(NamedTuple):
    """What a router chose, token by token, from which its losses are made.

    Args:
        index: [B, T, A]; a number of E or more counts for no expert.
        logits: [B, T, E].
    """

    index: Array
    logits: Array


def no_router(num_experts: int) -> RouterSums:
    """The sums of a layer without a router, in a model whose mixtures have `num_experts`."""
    zero = jnp.zeros((), jnp.float32)
    return RouterSums(zero, zero, jnp.zeros(num_experts, jnp.float32))


def router_sums(
    choices: Choices,
    weights: Array,
    config: ExpertsConfig,
    operations: Operations,
) -> RouterSums:
    """Balance loss E sum_e f_e P_e and z-loss log^2 Z, as sums over own valid tokens.

    f_e is the share of all choices in this micro-batch that fell on expert e, over all devices, and
    is not differentiated. So each token's balance loss is E sum_e f_e p_e, and the sum over devices
    equals the loss of one device with as many micro-batches.

    f_e counts the experts that were drawn, p_e is the whole softmax, unmasked; both are of one
    layer.

    Source: Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6; Zoph et al. 2022
        (arXiv 2202.08906), equation 5; over all devices, Liu et al. 2024 (arXiv 2409.12136),
        section 3.3.
    Args:
        choices: of the tokens [B, T].
        weights: [B, T], 0 for padding.
        config: of the mixture.
        operations: what the mesh injects.
    """
    own_tokens = operations.collectives.own_tokens
    index = own_tokens(choices.index)
    logits = own_tokens(choices.logits)
    weights = own_tokens(weights)
    is_chosen = jax.nn.one_hot(index, config.num_experts, dtype=logits.dtype).sum(-2)
    load = lax.stop_gradient((is_chosen * weights[..., None]).sum((0, 1)))
    total = operations.collectives.sum_over_tokens(load)
    share = total / jnp.where(total.sum() > 0, total.sum(), 1)
    probabilities = jax.nn.softmax(logits) * weights[..., None]
    balance = config.num_experts * jnp.einsum("e,bte->", share, probabilities)
    z = (jax.nn.logsumexp(logits, -1) ** 2 * weights).sum()
    return RouterSums(config.balance_loss * balance, config.z_loss * z, load)


def experts(
    params: Params,
    h: Array,
    config: ExpertsConfig,
    operations: Operations,
    draws: Draws | None = None,
) -> tuple[Array, Choices]:
    """Routes each token and applies its experts.

    Args:
        params: the layer's `moe` parameters.
        h: normalised input [B, T, D].
        config: of the mixture.
        operations: what the mesh injects.
        draws: of these tokens in training; None in evaluation and serving.
    Returns:
        (this device's part of the output [B, T, D], what the router chose).
    """
    logits = operations.backends.name("router", router_logits(params, h))
    index, gates, slopes, is_chosen = route(logits, draws, config)
    dropout = None
    if draws is not None and config.dropout:
        num_columns = params["experts"]["up"].shape[-1]
        first = operations.collectives.first_column(num_columns)
        dropout = Dropout(draws.streams(EXPERT, index), config.dropout, first)
    y = operations.backends.experts(
        h, index, gates, params["experts"], config.activation, slopes, dropout
    )
    if config.has_output_scale:
        y = (accumulator(y) * accumulator(params["omega"])).astype(y.dtype)
    if config.shared_dim:
        y = y + _shared_expert(params["shared"], h, config.activation)
    if is_chosen is not None:
        index = jnp.where(is_chosen, index, config.num_experts)
    return y, Choices(index, logits)


def _shared_expert(params: Params, h: Array, activation: str) -> Array:
    """sigmoid(w . h) times the expert that every token visits; this device's part of [B, T, D].

    Source: Yang et al. 2024 (arXiv 2407.10671), section 2.2.2; the sigmoid is of its released code.
    """
    if "gate_up" in params:
        gate, up = linear_joined(h, params["gate_up"])
    else:
        gate, up = linear_each("btd,df->btf", h, [params["gate"], params["up"]])
    y = linear("btf,fd->btd", activate(activation, gate, up), params["down"])
    weight = jax.nn.sigmoid(accumulator(h) @ accumulator(params["weight"]))
    return (accumulator(y) * weight).astype(y.dtype)
