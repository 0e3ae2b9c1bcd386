"""Routers: which experts a token visits, with which weights, and how the choice is differentiated."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.models.config import ModelConfig
from jaxscale.models.sparsemixer import ESTIMATORS, Mixture, numbers_of, select_all, sparsemixer
from jaxscale.ops.draws import Draws
from jaxscale.ops.precision import accumulator
from jaxscale.ops.split_product import split_product
from jaxscale.types import Array, Params


def logits_of(params: Params, h: Array) -> Array:
    """The router's logits [B, T, E] of h [B, T, D], in at least float32 whatever the type of `h`."""
    router = accumulator(params["router"])
    if (h.dtype, router.dtype) == (jnp.bfloat16, jnp.float32):
        return split_product(h.reshape(-1, h.shape[-1]), router).reshape(*h.shape[:-1], -1)
    return jnp.einsum("btd,de->bte", accumulator(h), router, precision=lax.Precision.HIGHEST)


def route(logits: Array, draws: Draws | None, config: ModelConfig) -> Mixture:
    """The experts of each token as `config.router` says; without draws every router takes the most probable ones.

    Args:
        logits: [B, T, E].
        draws: of these tokens in training; None in evaluation and serving.
    """
    if config.router in ESTIMATORS:
        return sparsemixer(logits, draws, config)
    if config.router == "masked_sampling" and draws is not None:
        return masked_sampling(logits, draws, config)
    if config.router == "densemixer" and draws is not None:
        return densemixer(logits, config)
    return top_k(logits, config)


def top_k(logits: Array, config: ModelConfig) -> Mixture:
    """Top-k routing; gates are renormalised over the chosen experts, unless there is only one.

    A single renormalised gate would be 1 and give the router no gradient, so it stays the expert's
    probability.

    Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 2.2; top-1, Fedus et al. 2021 (arXiv
        2101.03961), equation 2; without capacity, so nothing is dropped.
    """
    gates, index = lax.top_k(jax.nn.softmax(logits), config.num_active_experts)
    return Mixture(index, _renormalised(gates))


def masked_sampling(logits: Array, draws: Draws, config: ModelConfig) -> Mixture:
    """SparseMixer-v2's draws with the gates of `top_k`: the control that tells sampling from its gradient.

    Source: Liu et al. 2024 (arXiv 2409.12136), appendix A.4.
    """
    found = select_all(logits, numbers_of(draws, config), config)
    index = jnp.stack([selection.index for selection in found], -1)
    return Mixture(index, _renormalised(jnp.take_along_axis(jax.nn.softmax(logits), index, -1)))


def densemixer(logits: Array, config: ModelConfig) -> Mixture:
    """`top_k` whose router learns from the outputs of all experts: the straight-through gradient.

    Forward and the experts' own gradients are those of `top_k`. The loss's gradient to the gate of
    an expert that was not chosen is that of a gate p_i / sum_chosen p, the sum held fixed (p_i
    itself if there is one active expert).

    Source: Yao et al. 2025, "DenseMixer: improving MoE post-training with precise router gradient",
        as released (github.com/yaof20/DenseMixer, its `partscale_fix_expert` normalisation).
    Returns:
        The mixture with all E experts for each token, in their order; gates and slopes of those not
        chosen are 0.
    Cost: every expert runs on every token, forward and backward: E / A times the FLOPs of `top_k`.
    """
    p = jax.nn.softmax(logits)
    is_chosen = jax.nn.one_hot(
        lax.top_k(p, config.num_active_experts)[1], config.num_experts, dtype=bool
    ).any(-2)
    if config.num_active_experts > 1:
        total = jnp.where(is_chosen, p, 0).sum(-1, keepdims=True)
        p = jnp.where(is_chosen, p / total, p / lax.stop_gradient(total))
    gates = p - lax.stop_gradient(jnp.where(is_chosen, 0, p))
    index = jnp.broadcast_to(jnp.arange(config.num_experts), p.shape)
    return Mixture(index, gates, lax.stop_gradient(gates), is_chosen)


def _renormalised(gates: Array) -> Array:
    """Gates [B, T, A] that sum to 1; a single one stays as it is."""
    return gates / gates.sum(-1, keepdims=True) if gates.shape[-1] > 1 else gates
