"""Experts spread over devices; no token is ever dropped.

Experts are either sharded over `expert`, to which tokens are sent, or they lie whole on the ranks
of `tensor`, which have the tokens already.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops import moe
from jaxscale.ops.dispatch import make_dispatch
from jaxscale.ops.draws import Dropout
from jaxscale.ops.moe import grouped_ffn
from jaxscale.ops.precision import accumulator
from jaxscale.parallel.mesh import EXPERT, TENSOR, MeshConfig
from jaxscale.types import Array, Params


def make_experts(config: MeshConfig) -> Callable:
    """The `experts` operation of a mesh."""
    if config.expert_axis == TENSOR:
        return tensor_experts if config.tensor > 1 else moe.experts
    if config.expert == 1:
        return moe.experts
    return experts


def experts(
    x: Array,
    index: Array,
    gates: Array,
    weights: Params,
    activation: str,
    slopes: Array | None = None,
    dropout: Dropout | None = None,
) -> Array:
    """`ops.moe.experts` with the experts sharded over `expert`.

    Local weights have leading dim E / expert. The choices of a token are different experts.

    Shapes are static and no token may be dropped, so any device must be able to get all tokens of
    any other. A token is sent to each device once, and not once for each of its experts there:
    every device gathers all tokens, runs the choices that fell on its experts, and sends back one
    sum of their gated outputs for each token. The sums are rounded to the type of `x` before they
    are sent, and added in float32.

    Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 3.2, without its capacity.
    Args and Returns as `ops.moe.experts`.
    Cost: with n local tokens, 2 expert n D elements received, forward, and as many backward; else
        as `_share`.
    """
    index = _all_gather(index)
    if slopes is not None:
        slopes = _all_gather(lax.stop_gradient(slopes))
    if dropout is not None:
        # Each token draws from keys of its own, so that the draws do not depend on the mesh.
        dropout = dataclasses.replace(dropout, keys=_all_gather(dropout.keys))
    x, gates = _gather(x), _gather(gates)
    return _sum_of_shares(_share(x, index, gates, weights, activation, slopes, dropout, EXPERT))


def tensor_experts(
    x: Array,
    index: Array,
    gates: Array,
    weights: Params,
    activation: str,
    slopes: Array | None = None,
    dropout: Dropout | None = None,
) -> Array:
    """`ops.moe.experts` with whole experts on each rank of `tensor`.

    Every rank has all the group's tokens already, so nothing is exchanged here.

    Source: Liu et al. 2024 (arXiv 2409.12136), section 3.2.
    Args: x [B, T, D], index, gates and slopes [B, T, A], the same on every rank; else as
    `ops.moe.experts`.
    Returns:
        This rank's part of the output [B, T, D].
    Cost: as `_share`.
    """
    return _share(x, index, gates, weights, activation, slopes, dropout, TENSOR)


def _share(
    x: Array,
    index: Array,
    gates: Array,
    weights: Params,
    activation: str,
    slopes: Array | None,
    dropout: Dropout | None,
    axis: str,
) -> Array:
    """The part of each token's gated sum that this member's experts have in it.

    The choices of other members' experts come after the last expert's rows, where a grouped matmul
    computes nothing.

    Args:
        axis: over which the experts are sharded; else as `ops.moe.experts`.
    Returns:
        [B, T, D].
    Cost: two buffers of B T min(A, local experts) rows of D elements are kept for the backward, as
        any member may be chosen for all tokens, beside the rows of F that the feed-forward keeps.
    """
    num_local, num_active = weights["up"].shape[0], index.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])
    local = index.reshape(-1, num_active) - lax.axis_index(axis) * num_local
    is_here = (local >= 0) & (local < num_local)
    num_rows = len(tokens) * min(num_active, num_local)
    dispatch = make_dispatch(jnp.where(is_here, local, num_local), num_local, num_rows)
    if dropout is not None:
        dropout = dataclasses.replace(dropout, keys=dispatch.keys(dropout.keys))
    rows, sizes = dispatch.rows(tokens), dispatch.group_sizes
    outputs = grouped_ffn(rows, sizes, weights, activation, dropout, needs_tail=False)
    if slopes is not None:
        slopes = slopes.reshape(-1, num_active)
    return dispatch.combine(outputs, gates.reshape(-1, num_active), slopes).reshape(x.shape)


def _all_gather(x: Array) -> Array:
    """The rows [B, ...] of all members, [expert B, ...]."""
    return lax.all_gather(x, EXPERT, tiled=True)


@jax.custom_vjp
def _gather(x: Array) -> Array:
    """`_all_gather` whose gradient is the sum of all members' gradients."""
    return _all_gather(x)


_gather.defvjp(lambda x: (_gather(x), None), lambda _, cotangent: (_sum_of_shares(cotangent),))


@jax.custom_vjp
def _sum_of_shares(shares: Array) -> Array:
    """Sums over the members' [expert B, ...] to [B, ...], rounded once.

    Each member gets the rows that are its own from all and adds them in float32; a reduce-scatter
    would send as much, and round after each addition.
    """
    parts = lax.all_to_all(shares, EXPERT, 0, 0, tiled=True)
    parts = parts.reshape(lax.axis_size(EXPERT), -1, *shares.shape[1:])
    return accumulator(parts).sum(0).astype(shares.dtype)


_sum_of_shares.defvjp(
    lambda shares: (_sum_of_shares(shares), None), lambda _, cotangent: (_all_gather(cotangent),)
)
