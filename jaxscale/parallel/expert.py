"""Experts spread over devices; no token is ever dropped.

Experts are either sharded over `expert`, to which tokens are sent, or they lie whole on the ranks
of `tensor`, which have the tokens already.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

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
    """Raises InputError for a ragged exchange where nothing is exchanged, or on a CPU."""
    if config.expert_exchange != "ragged":
        return
    if config.expert_axis != EXPERT:
        expected = '"dense" with MeshConfig.expert_axis = "tensor", which exchanges no tokens'
        raise InputError("MeshConfig.expert_exchange", "ragged", expected)
    has_cpu = any(device.platform == "cpu" for device in devices)
    if config.expert > 1 and has_cpu:
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
    """`ops.moe.experts` with the experts sharded over `expert`.

    Local weights have leading dim E / expert. The choices of a token are different experts.

    Tokens travel in one dense all-to-all whose buffers hold the worst case, so that no routing can
    drop a token. With n local tokens and A choices each, these are `expert` blocks of
    n min(A, E / expert) rows each way. The same devices get the outputs back and weigh them. The
    unused rows of a block come after the last expert's rows, where a grouped matmul computes
    nothing, but they are sent and stored like the others.

    Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 3.2, without its capacity.
    Args and Returns as `ops.moe.experts`.
    Cost: with R = expert n min(A, E / expert) rows, which is a fixed number of times (expert min(A,
        E / expert) / A) the rows that are used: 2 R D elements exchanged, forward; three buffers
        [R, D] kept for the backward beside the R F that the feed-forward keeps.
    """
    num_shards = lax.axis_size(EXPERT)
    num_local = _num_experts(weights)
    dispatch, rows = _sort(x, index, num_local * num_shards)
    counts = dispatch.group_sizes.reshape(num_shards, num_local)
    capacity = _capacity(x, index, num_local)
    by_shard = counts.sum(1)
    starts = jnp.cumsum(by_shard) - by_shard
    shard = index.reshape(-1)[dispatch.order] // num_local
    place_in_block = jnp.arange(len(rows)) - starts[shard]
    slots = shard * capacity + place_in_block

    def send(rows: Array) -> Array:
        """Sorted rows to blocks [expert, C, D] from every device."""
        width = rows.shape[-1]
        buffer = jnp.zeros((num_shards * capacity, width), rows.dtype)
        buffer = buffer.at[slots].set(rows, unique_indices=True)
        return _exchange(buffer.reshape(num_shards, capacity, -1))

    if dropout is not None:
        # Each token draws from keys of its own, so that the draws do not depend on the mesh.
        keys = dispatch.keys(dropout.keys)
        dropout = dataclasses.replace(dropout, keys=send(keys))
    outputs = _apply(send(rows), _exchange(counts), weights, activation, dropout)
    returned = _exchange(outputs).reshape(num_shards * capacity, -1)
    return _combine(returned[slots], dispatch, gates, slopes)


def ragged_experts(
    x: Array,
    index: Array,
    gates: Array,
    weights: Params,
    activation: str,
    slopes: Array | None = None,
    dropout: Dropout | None = None,
) -> Array:
    """`experts` with an exchange that carries only the rows that are used, on GPUs.

    The numbers of rows are gathered first. Each expert's rows are sent separately, so that the rows
    of an expert arrive side by side from all devices and need no sorting there.

    Args and Returns as `ops.moe.experts`.
    Cost: 2 n A D elements exchanged, forward. As shapes are static and no token is dropped, the
        receiving buffer is that of the worst case, expert n min(A, E / expert) rows as in
        `experts`, but there is only one; the rows at the sender are n A.
    """
    num_shards = lax.axis_size(EXPERT)
    num_local = _num_experts(weights)
    dispatch, rows = _sort(x, index, num_local * num_shards)
    there, back = _routes(dispatch.group_sizes, num_local)
    num_received = num_shards * _capacity(x, index, num_local)

    def send(rows: Array) -> Array:
        return _carry(rows, num_received, there, back)

    if dropout is not None:
        keys = dispatch.keys(dropout.keys)
        dropout = dataclasses.replace(dropout, keys=send(keys))
    sizes = there.sizes.reshape(num_shards, num_local).sum(0)
    outputs = grouped_ffn(send(rows), sizes, weights, activation, dropout, needs_tail=False)
    returned = _carry(outputs, len(rows), back, there)
    return _combine(returned, dispatch, gates, slopes)


class _Route(NamedTuple):
    """One way of a ragged exchange; each [devices * local experts], by device and then by expert.

    Args:
        starts: where the rows that go to a device for an expert begin here.
        counts: how many they are.
        places: where they begin there.
        sizes: numbers of rows that come from a device for an expert.
    """

    starts: Array
    counts: Array
    places: Array
    sizes: Array


def _routes(counts: Array, num_local: int) -> tuple[_Route, _Route]:
    """The way of this device's rows, `counts` [E] of them for each expert, and the way back.

    The rows of an expert lie side by side at its device, sender after sender.
    """
    num_shards, me = lax.axis_size(EXPERT), lax.axis_index(EXPERT)
    # All arrays are [sender, receiver, local expert] of all devices.
    all_counts = lax.all_gather(counts, EXPERT)
    starts = jnp.cumsum(all_counts, 1) - all_counts
    by_pair = num_shards, num_shards, num_local
    all_counts, starts = all_counts.reshape(by_pair), starts.reshape(by_pair)
    in_order = all_counts.transpose(1, 2, 0)  # [receiver, local expert, sender]
    ends = jnp.cumsum(in_order.reshape(num_shards, -1), 1).reshape(in_order.shape)
    places = ends.transpose(2, 0, 1) - all_counts

    def sent(x: Array) -> Array:
        return x[me].reshape(-1)

    def received(x: Array) -> Array:
        return x[:, me].reshape(-1)

    counts, sizes = sent(all_counts), received(all_counts)
    there = _Route(sent(starts), counts, sent(places), sizes)
    back = _Route(received(places), sizes, received(starts), counts)
    return there, back


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _carry(rows: Array, num_received: int, there: _Route, back: _Route) -> Array:
    """Rows [sent, D] to [num_received, D], 0 where none arrives; the gradient takes the way back.

    The buffer is made when the rows are there: XLA would otherwise make those of all layers at the
    beginning of the step.
    """
    zero, rows = lax.optimization_barrier((jnp.zeros((), rows.dtype), rows))
    buffer = jnp.full((num_received, rows.shape[-1]), zero)
    return lax.ragged_all_to_all(rows, buffer, *there, axis_name=EXPERT)


def _carry_forward(rows: Array, num_received: int, there: _Route, back: _Route) -> tuple:
    return _carry(rows, num_received, there, back), (len(rows), there, back)


def _carry_backward(num_received: int, residuals: tuple, cotangent: Array) -> tuple:
    num_sent, there, back = residuals
    return _carry(cotangent, num_sent, back, there), None, None


_carry.defvjp(_carry_forward, _carry_backward)


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

    Local weights have leading dim E / tensor. Every rank has all the group's tokens, runs the
    choices that fell on its experts and returns their share of the sum. The other choices' rows
    come after the last expert's, where a grouped matmul computes nothing.

    Source: Liu et al. 2024 (arXiv 2409.12136), section 3.2.
    Args: x [B, T, D], index, gates and slopes [B, T, A], the same on every rank; else as
    `ops.moe.experts`.
    Returns:
        This rank's part of the output [B, T, D].
    Cost: nothing is exchanged; the buffers hold all B T A rows, as any rank may be chosen for all
        of them.
    """
    num_local = _num_experts(weights)
    local = index - lax.axis_index(TENSOR) * num_local
    is_here = (local >= 0) & (local < num_local)
    local = jnp.where(is_here, local, num_local)
    return moe.experts(x, local, gates, weights, activation, slopes, dropout)


def _num_experts(weights: Params) -> int:
    return weights["up"].shape[0]


def _sort(x: Array, index: Array, num_experts: int) -> tuple[Dispatch, Array]:
    """The choices sorted by expert, and the rows of `x` [B, T, D] in that order."""
    num_active, dim = index.shape[-1], x.shape[-1]
    dispatch = make_dispatch(index.reshape(-1, num_active), num_experts)
    return dispatch, dispatch.rows(x.reshape(-1, dim))


def _combine(
    outputs: Array,
    dispatch: Dispatch,
    gates: Array,
    slopes: Array | None,
) -> Array:
    """The gated sum [B, T, D] over each token's choices of sorted outputs."""
    *tokens, num_active = gates.shape
    if slopes is not None:
        slopes = slopes.reshape(-1, num_active)
    y = dispatch.combine(outputs, gates.reshape(-1, num_active), slopes)
    return y.reshape(*tokens, -1)


def _capacity(x: Array, index: Array, num_local: int) -> int:
    """Most rows that one device can have for the experts of another.

    A token's choices are different experts, so it has at most min(A, E / expert) there.
    """
    num_rows, length, _ = x.shape
    num_active = index.shape[-1]
    return num_rows * length * min(num_active, num_local)


def _exchange(x: Array) -> Array:
    """All-to-all: block i of the leading dim goes to device i of the `expert` axis."""
    return lax.all_to_all(x, EXPERT, 0, 0, tiled=True)


def _apply(
    received: Array,
    counts: Array,
    weights: Params,
    activation: str,
    dropout: Dropout | None,
) -> Array:
    """Runs the local experts on what every device sent.

    Args:
        received: blocks [shards, C, D] whose first rows are sorted by expert.
        counts: [shards, local E] rows for each expert in each block.
        weights, activation, dropout: as `experts`.
    Returns:
        [shards, C, D]; undefined in the unused rows.
    """
    num_shards, capacity, width = received.shape
    ends = jnp.cumsum(counts, 1)
    row = jnp.arange(capacity)[None, :, None]
    # The number of experts whose rows end before this one; E / expert in the unused rows, which so
    # come last.
    expert = (row >= ends[:, None, :]).sum(-1)
    order = jnp.argsort(expert.reshape(-1), stable=True)
    rows = received.reshape(-1, width)[order]
    if dropout is not None:
        keys = dropout.keys.reshape(-1, 2)[order]
        dropout = dataclasses.replace(dropout, keys=keys)
    y = grouped_ffn(rows, counts.sum(0), weights, activation, dropout, needs_tail=False)
    in_blocks = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
    return in_blocks.reshape(num_shards, capacity, -1)
