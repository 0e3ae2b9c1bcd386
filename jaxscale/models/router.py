"""Routers: which experts a token visits, with which weights, and the gradient of the choice."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.models.config import (
    DenseMixerRouter,
    ExpertsConfig,
    MaskedSamplingRouter,
    SparseMixerRouter,
)
from jaxscale.models.sparsemixer import Routing, draw_experts, random_numbers, sparsemixer
from jaxscale.ops.draws import Draws
from jaxscale.ops.precision import accumulator
from jaxscale.ops.split_product import split_product
from jaxscale.types import Array, Params


def router_logits(params: Params, h: Array) -> Array:
    """The router's logits [B, T, E] of h [B, T, D], in at least float32."""
    router = accumulator(params["router"])
    if (h.dtype, router.dtype) == (jnp.bfloat16, jnp.float32):
        logits = split_product(h.reshape(-1, h.shape[-1]), router)
        return logits.reshape(*h.shape[:-1], -1)
    return jnp.einsum("btd,de->bte", accumulator(h), router, precision=lax.Precision.HIGHEST)


def route(
    logits: Array,
    draws: Draws | None,
    config: ExpertsConfig,
) -> Routing:
    """The experts of each token; without draws every router takes the most probable ones.

    Args:
        logits: [B, T, E].
        draws: of these tokens in training; None in evaluation and serving.
        config: of the mixture.
    """
    if isinstance(config.router, SparseMixerRouter):
        return sparsemixer(logits, draws, config)
    if draws is not None and isinstance(config.router, MaskedSamplingRouter):
        return masked_sampling(logits, draws, config)
    if draws is not None and isinstance(config.router, DenseMixerRouter):
        return densemixer(logits, config)
    is_renormalised = getattr(config.router, "is_renormalised", True)
    return top_k(logits, config.num_active, is_renormalised=is_renormalised)


def top_k(
    logits: Array,
    num_active: int,
    *,
    is_renormalised: bool = True,
) -> Routing:
    """Top-k routing, see `models.config.TopKRouter`.

    Args:
        logits: [B, T, E] in at least float32.
        num_active: k, experts a token.
        is_renormalised: whether the gates of the chosen experts sum to 1.
    Returns:
        Index and gates [B, T, k], the most probable expert first.
    """
    gates, index = lax.top_k(jax.nn.softmax(logits), num_active)
    return Routing(index, _renormalised(gates) if is_renormalised else gates)


def masked_sampling(
    logits: Array,
    draws: Draws,
    config: ExpertsConfig,
) -> Routing:
    """SparseMixer-v2's draws with the gates of `top_k`, to tell sampling from its gradient.

    Source: Liu et al. 2024 (arXiv 2409.12136), appendix A.4.
    """
    found = draw_experts(logits, random_numbers(draws, config), config)
    index = jnp.stack([selection.index for selection in found], -1)
    gates = jnp.take_along_axis(jax.nn.softmax(logits), index, -1)
    return Routing(index, _renormalised(gates))


def densemixer(logits: Array, config: ExpertsConfig) -> Routing:
    """`top_k` whose router learns from the outputs of all experts: the straight-through gradient.

    Forward and the experts' own gradients are those of `top_k`. The loss's gradient to the gate of
    an expert that was not chosen is that of a gate p_i / sum_chosen p, the sum held fixed (p_i
    itself if there is one active expert).

    Source: Yao et al. 2025, "DenseMixer: improving MoE post-training with precise router gradient",
        as released (github.com/yaof20/DenseMixer, its `partscale_fix_expert` normalisation).
    Returns:
        All E experts for each token, in their order; gates and slopes of those not chosen are 0.
    Cost: every expert runs on every token, forward and backward: E / A times the FLOPs of `top_k`.
    """
    p = jax.nn.softmax(logits)
    index = lax.top_k(p, config.num_active)[1]
    is_chosen = jax.nn.one_hot(index, config.num_experts, dtype=bool).any(-2)
    if config.num_active > 1:
        total = jnp.where(is_chosen, p, 0).sum(-1, keepdims=True)
        p = jnp.where(is_chosen, p / total, p / lax.stop_gradient(total))
    # Zero in the forward for an expert that was not chosen, with the gradient of p.
    gates = p - lax.stop_gradient(jnp.where(is_chosen, 0, p))
    every = jnp.broadcast_to(jnp.arange(config.num_experts), p.shape)
    return Routing(every, gates, lax.stop_gradient(gates), is_chosen)


def _renormalised(gates: Array) -> Array:
    """Gates [B, T, A] that sum to 1; a single one stays as it is."""
    if gates.shape[-1] == 1:
        return gates
    return gates / gates.sum(-1, keepdims=True)
