"""Expert parallelism: a dropless exchange of tokens over the `expert` axis."""

import jax.numpy as jnp
from jax import lax

from jaxscale.ops.moe import grouped_ffn
from jaxscale.parallel.mesh import EXPERT
from jaxscale.types import Array, Params


def experts(x: Array, index: Array, gates: Array, weights: Params, activation: str) -> Array:
    """`ops.moe.experts` with the experts spread over `expert`: local weights have leading dim E / expert.

    The choices of a token are different experts.

    Tokens travel in one dense all-to-all whose buffers hold the worst case, so no routing can drop a token: with n
    local tokens and A choices each, `expert` blocks of n min(A, E / expert) rows each way. The same devices get the
    outputs back and weigh them.

    Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 3.2, without its capacity.
    Args and Returns as `ops.moe.experts`.
    Cost: 2 expert n min(A, E / expert) D elements exchanged, forward.
    """
    num_shards, num_local = lax.axis_size(EXPERT), weights["up"].shape[0]
    num_active, num_experts = index.shape[-1], weights["up"].shape[0] * num_shards
    flat = index.reshape(-1)
    capacity = flat.shape[0] // num_active * min(num_active, num_local)

    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
    starts = jnp.cumsum(counts.reshape(num_shards, num_local).sum(1)) - counts.reshape(num_shards, num_local).sum(1)
    shard = flat[order] // num_local
    slots = shard * capacity + jnp.arange(flat.shape[0]) - starts[shard]

    rows = x.reshape(-1, x.shape[-1])[order // num_active]
    sent = jnp.zeros((num_shards * capacity, x.shape[-1]), x.dtype).at[slots].set(rows, unique_indices=True)
    received = _exchange(sent.reshape(num_shards, capacity, -1))
    outputs = _exchange(_apply(received, _exchange(counts.reshape(num_shards, num_local)), weights, activation))

    y = outputs.reshape(num_shards * capacity, -1)[slots] * gates.reshape(-1)[order][:, None].astype(x.dtype)
    unsorted = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
    return unsorted.reshape(*x.shape[:-1], num_active, -1).sum(-2)


def _exchange(x: Array) -> Array:
    """Block i of the leading dim goes to device i of the `expert` axis."""
    return lax.all_to_all(x, EXPERT, 0, 0, tiled=True)


def _apply(received: Array, counts: Array, weights: Params, activation: str) -> Array:
    """Runs the local experts on blocks [shards, C, D] whose first rows are sorted by expert, `counts` [shards, E]."""
    num_shards, capacity, width = received.shape
    ends = jnp.cumsum(counts, 1)
    expert = (jnp.arange(capacity)[None, :, None] >= ends[:, None, :]).sum(-1)  # = E / expert past the last row
    order = jnp.argsort(expert.reshape(-1), stable=True)
    rows = received.reshape(-1, width)[order]
    y = grouped_ffn(rows, counts.sum(0), weights, activation)
    return jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(num_shards, capacity, -1)
