"""Experts spread over devices, no token ever dropped: exchanged over `expert`, or whole on the ranks of `tensor`."""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops import moe
from jaxscale.ops.dispatch import Dispatch, make_dispatch
from jaxscale.ops.draws import Dropout
from jaxscale.ops.moe import grouped_ffn
from jaxscale.parallel.mesh import EXPERT, TENSOR, MeshConfig
from jaxscale.types import Array, InputError, Params


def make_experts(config: MeshConfig) -> Callable:
    """The `experts` operation of a mesh."""
    if config.expert_axis == TENSOR:
        return tensor_experts if config.tensor > 1 else moe.experts
    if config.expert == 1:
        return moe.experts
    return ragged_experts if config.expert_exchange == "ragged" else experts


def check_exchange(config: MeshConfig, devices: Iterable[jax.Device]) -> None:
    """Raises InputError for a ragged exchange where there is none, or on devices that cannot do it."""
    if config.expert_exchange != "ragged":
        return
    if config.expert_axis != EXPERT:
        expected = '"dense" with MeshConfig.expert_axis = "tensor", which exchanges no tokens'
        raise InputError("MeshConfig.expert_exchange", "ragged", expected)
    kinds = {device.platform for device in devices} & {"cpu"}
    if config.expert > 1 and kinds:
        expected = '"dense" on a CPU: XLA has its ragged all-to-all on GPUs only'
        raise InputError("MeshConfig.expert_exchange", "ragged", expected)


def experts(
    x: Array,
    index: Array,
    gates: Array,
    weights: Params,
    activation: str,
    slopes: Array | None = None,
    dropout: Dropout | None = None,
) -> Array:
    """`ops.moe.experts` with the experts spread over `expert`: local weights have leading dim E / expert.

    The choices of a token are different experts.

    Tokens travel in one dense all-to-all whose buffers hold the worst case, so no routing can drop
    a token: with n local tokens and A choices each, `expert` blocks of n min(A, E / expert) rows
    each way. The same devices get the outputs back and weigh them. The rows that a block has too
    many come after the last expert's, where a grouped matmul computes nothing, but they are sent
    and stored like the others.

    Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 3.2, without its capacity.
    Args and Returns as `ops.moe.experts`.
    Cost: with R = expert n min(A, E / expert) rows, a fixed number of times (expert min(A, E /
        expert) / A) the rows there are: 2 R D elements exchanged, forward; three buffers [R, D]
        kept for the backward beside the R F that the feed-forward keeps.
    """
    num_shards, num_local = lax.axis_size(EXPERT), weights["up"].shape[0]
    dispatch, rows = _sort(x, index, num_local * num_shards)
    counts = dispatch.group_sizes.reshape(num_shards, num_local)
    capacity = _capacity(x, index.shape[-1], num_local)
    starts = jnp.cumsum(counts.sum(1)) - counts.sum(1)
    shard = index.reshape(-1)[dispatch.order] // num_local
    slots = shard * capacity + jnp.arange(len(rows)) - starts[shard]

    def forth(rows: Array) -> Array:
        sent = (
            jnp.zeros((num_shards * capacity, rows.shape[-1]), rows.dtype)
            .at[slots]
            .set(rows, unique_indices=True)
        )
        return _exchange(sent.reshape(num_shards, capacity, -1))

    if dropout is not None:
        dropout = dataclasses.replace(dropout, keys=forth(dispatch.keys(dropout.keys)))
    outputs = _exchange(_apply(forth(rows), _exchange(counts), weights, activation, dropout))
    return _combine(outputs.reshape(num_shards * capacity, -1)[slots], dispatch, gates, slopes)


def ragged_experts(
    x: Array,
    index: Array,
    gates: Array,
    weights: Params,
    activation: str,
    slopes: Array | None = None,
    dropout: Dropout | None = None,
) -> Array:
    """`experts` with an exchange that carries only the rows there are, on GPUs.

    The numbers of rows are exchanged first. Each expert's rows are sent apart, so that the rows of
    an expert arrive side by side from all devices and need no sorting there.

    Args and Returns as `ops.moe.experts`.
    Cost: 2 n A D elements exchanged, forward. As shapes are static and no token is dropped, the
        receiving buffer is that of the worst case, expert n min(A, E / expert) rows as in
        `experts`, but it is there once; the rows at the sender are n A.
    """
    num_shards, num_local = lax.axis_size(EXPERT), weights["up"].shape[0]
    dispatch, rows = _sort(x, index, num_local * num_shards)
    counts = dispatch.group_sizes
    starts = jnp.cumsum(counts) - counts
    sizes = _exchange(
        counts.reshape(num_shards, num_local)
    )  # [sender, expert] of the rows that come here
    ends = (
        jnp.cumsum(sizes.T).reshape(num_local, num_shards).T
    )  # all senders' rows of an expert lie together
    places = ends - sizes

    def forth(rows: Array) -> Array:
        buffer, there = (
            jnp.zeros((num_rows, rows.shape[-1]), rows.dtype),
            _exchange(places).reshape(-1),
        )
        return lax.ragged_all_to_all(
            rows, buffer, starts, counts, there, sizes.reshape(-1), axis_name=EXPERT
        )

    def back(rows: Array, buffer: Array) -> Array:
        there = _exchange(starts.reshape(num_shards, num_local)).reshape(-1)
        return lax.ragged_all_to_all(
            rows, buffer, places.reshape(-1), sizes.reshape(-1), there, counts, axis_name=EXPERT
        )

    num_rows = num_shards * _capacity(x, index.shape[-1], num_local)
    if dropout is not None:
        dropout = dataclasses.replace(dropout, keys=forth(dispatch.keys(dropout.keys)))
    outputs = back(
        grouped_ffn(forth(rows), sizes.sum(0), weights, activation, dropout), jnp.zeros_like(rows)
    )
    return _combine(outputs, dispatch, gates, slopes)


def tensor_experts(
    x: Array,
    index: Array,
    gates: Array,
    weights: Params,
    activation: str,
    slopes: Array | None = None,
    dropout: Dropout | None = None,
) -> Array:
    """`ops.moe.experts` with whole experts on each rank of `tensor`: local weights have leading dim E / tensor.

    Every rank has all the group's tokens, runs the choices that fell on its own experts and returns
    their share of the sum; the others' rows come after the last expert's, where a grouped matmul
    computes nothing.

    Source: Liu et al. 2024 (arXiv 2409.12136), section 3.2.
    Args: x [B, T, D], index, gates and slopes [B, T, A], the same on every rank; else as
    `ops.moe.experts`.
    Returns:
        This rank's part of the output [B, T, D].
    Cost: nothing is exchanged; the buffers hold all B T A rows, as any rank may be chosen for all
        of them.
    """
    num_local = weights["up"].shape[0]
    local = index - lax.axis_index(TENSOR) * num_local
    is_here = (local >= 0) & (local < num_local)
    return moe.experts(
        x, jnp.where(is_here, local, num_local), gates, weights, activation, slopes, dropout
    )


def _sort(x: Array, index: Array, num_experts: int) -> tuple[Dispatch, Array]:
    """The choices sorted by expert, and the rows of `x` [B, T, D] in that order."""
    dispatch = make_dispatch(index.reshape(-1, index.shape[-1]), num_experts)
    return dispatch, dispatch.rows(x.reshape(-1, x.shape[-1]))


def _combine(outputs: Array, dispatch: Dispatch, gates: Array, slopes: Array | None) -> Array:
    """The gated sum [B, T, D] over each token's choices of sorted outputs."""
    slopes = None if slopes is None else slopes.reshape(-1, gates.shape[-1])
    y = dispatch.combine(outputs, gates.reshape(-1, gates.shape[-1]), slopes)
    return y.reshape(*gates.shape[:-1], -1)


def _capacity(x: Array, num_active: int, num_local: int) -> int:
    """Most rows that one device can have for the experts of another: a token's choices are different experts."""
    return x.shape[0] * x.shape[1] * min(num_active, num_local)


def _exchange(x: Array) -> Array:
    """Block i of the leading dim goes to device i of the `expert` axis."""
    return lax.all_to_all(x, EXPERT, 0, 0, tiled=True)


def _apply(
    received: Array, counts: Array, weights: Params, activation: str, dropout: Dropout | None
) -> Array:
    """Runs the local experts on blocks [shards, C, D] whose first rows are sorted by expert, `counts` [shards, E]."""
    num_shards, capacity, width = received.shape
    ends = jnp.cumsum(counts, 1)
    expert = (jnp.arange(capacity)[None, :, None] >= ends[:, None, :]).sum(
        -1
    )  # = E / expert past the last row
    order = jnp.argsort(expert.reshape(-1), stable=True)
    rows = received.reshape(-1, width)[order]
    dropout = (
        None
        if dropout is None
        else dataclasses.replace(dropout, keys=dropout.keys.reshape(-1, 2)[order])
    )
    y = grouped_ffn(rows, counts.sum(0), weights, activation, dropout)
    return jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(num_shards, capacity, -1)
