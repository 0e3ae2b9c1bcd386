"""The contiguous key-value cache and the attention callable that owns it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxscale.ops.attention.context import AttentionContext
from jaxscale.ops.attention.reference import attend as reference
from jaxscale.types import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "positions", "segments", "length"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer, filled from slot 0 upwards.

    Args:
        k: [B, S, K, H].
        v: [B, S, K, H].
        positions: [B, S] int32, -1 where the slot holds no token.
        segments: [B, S] int32, 0 where the slot holds no token.
        length: [] int32, slots in use.
    """

    k: Array
    v: Array
    positions: Array
    segments: Array
    length: Array


def empty_cache(
    batch_size: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: str
) -> KVCache:
    """A cache of `capacity` free slots per row."""
    keys = jnp.zeros((batch_size, capacity, num_kv_heads, head_dim), dtype)
    return KVCache(
        k=keys,
        v=keys,
        positions=jnp.full((batch_size, capacity), -1, jnp.int32),
        segments=jnp.zeros((batch_size, capacity), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def attend(
    q: Array, k: Array, v: Array, context: AttentionContext, cache: KVCache
) -> tuple[Array, KVCache]:
    """Appends the new keys to the cache and attends over all of it.

    A token with a negative position is written but never seen, so a ragged batch of prompts pads on
    the left.

    Args:
        q: [B, T, N, H] queries of the new tokens.
        k: [B, T, K, H] their keys.
        v: [B, T, K, H] their values.
        context: positions and segments of the new tokens, [B, T]; the layer's window, soft-cap and
            scale.
        cache: what came before; its capacity must hold T more slots.
    Returns:
        ([B, T, N, H], the longer cache). The output is NaN once the cache has overflowed: a
        compiled loop cannot raise, and the write lands on the last slots.
    """
    segments = jnp.ones_like(context.positions) if context.segments is None else context.segments
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=cache.length, axis=1)
    cache = KVCache(
        k=put(cache.k, k.astype(cache.k.dtype)),
        v=put(cache.v, v.astype(cache.v.dtype)),
        positions=put(cache.positions, context.positions.astype(jnp.int32)),
        segments=put(cache.segments, segments.astype(jnp.int32)),
        length=cache.length + q.shape[1],
    )
    seen = dataclasses.replace(
        context, segments=segments, key_positions=cache.positions, key_segments=cache.segments
    )
    o = reference(q, cache.k, cache.v, seen)
    return jnp.where(cache.length <= cache.k.shape[1], o, jnp.nan), cache
