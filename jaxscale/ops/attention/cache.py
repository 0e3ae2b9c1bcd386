"""The contiguous key-value cache, and attention that fills it and reads it."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.attention import cache_kernels as kernels
from jaxscale.ops.attention.api import attention
from jaxscale.ops.attention.context import NEVER, AttentionContext
from jaxscale.ops.device import device_refusal, kernel_family
from jaxscale.types import Array, InputError, check_choice

logger = logging.getLogger(__name__)

BACKENDS = ("xla", "mosaic")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "positions", "segments", "length"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer, filled from slot 0 upwards.

    Args:
        k: [B, K, S, H]. Heads before slots, so that each head's keys lie together in memory, as the
            matmuls of attention read them.
        v: [B, K, S, H].
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
    batch_size: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
) -> KVCache:
    """A cache of `capacity` free slots per row; a long one has some more, to be whole pages."""
    shape = batch_size, num_kv_heads, capacity, head_dim
    if kernels.is_long(shape, jnp.dtype(dtype).itemsize):
        capacity += -capacity % kernels.PAGE
        shape = batch_size, num_kv_heads, capacity, head_dim
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        positions=jnp.full((batch_size, capacity), -1, jnp.int32),
        segments=jnp.zeros((batch_size, capacity), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def prefill(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    cache: KVCache,
    *,
    implementation: str | None = None,
) -> tuple[Array, KVCache]:
    """Writes the first tokens to an empty cache and attends over them, by a backend of `attention`.

    Args and Returns as `attend`; the caller vouches that the cache is empty.
    """
    cache, segments = _append(k, v, context, cache)
    own_tokens = dataclasses.replace(context, segments=segments)
    o, _ = attention(q, k, v, own_tokens, implementation=implementation)
    return o, cache


def attend(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    cache: KVCache,
    *,
    implementation: str | None = None,
) -> tuple[Array, KVCache]:
    """Appends the new keys to the cache and attends over all of it.

    A token with a negative position is written but never seen, so that a ragged batch of prompts
    pads on the left.

    Args:
        q: [B, T, N, H] queries of the new tokens.
        k: [B, T, K, H] their keys.
        v: [B, T, K, H] their values.
        context: positions and segments of the new tokens, [B, T]; the layer's window, soft-cap and
            scale.
        cache: what came before; its capacity must hold T more slots.
        implementation: one of BACKENDS; "mosaic" is our kernel for one token a row on Hopper GPUs.
            None picks one and logs it.
    Returns:
        ([B, T, N, H], the longer cache). The output is NaN once the cache has overflowed: a
        compiled loop cannot raise, and the write lands on the last slots. The slots that a token
        sees may be any.
    Raises:
        InputError: the named backend cannot do what is asked.
    """
    if implementation is None:
        implementation = _choose(q, context, cache)
    check_choice("implementation", implementation, BACKENDS)
    is_kernel = implementation == "mosaic"
    if is_kernel and (reason := kernels.refusal(q, cache.k, context) or device_refusal("mosaic")):
        raise InputError("implementation", implementation, reason)
    cache, segments = _append(k, v, context, cache)
    seen = dataclasses.replace(
        context,
        segments=segments,
        key_positions=cache.positions,
        key_segments=cache.segments,
    )
    over = kernels.over_slots if is_kernel else over_keys
    o = over(q, cache.k, cache.v, seen)
    return jnp.where(cache.length <= cache.k.shape[2], o, jnp.nan), cache


def _choose(q: Array, context: AttentionContext, cache: KVCache) -> str:
    """The kernel for one token behind a long cache where it can, else XLA."""
    if q.shape[1] != 1 or not kernels.is_long(cache.k.shape, cache.k.dtype.itemsize):
        return "xla"
    is_ours = kernel_family() == "mosaic"
    reason = kernels.refusal(q, cache.k, context) if is_ours else device_refusal("mosaic")
    chosen = "mosaic" if is_ours and not reason else "xla"
    why = f", as mosaic needs {reason}" if reason else ""
    logger.info("attention over a long cache: backend %s for %s%s", chosen, q.dtype, why)
    return chosen


def _append(
    k: Array,
    v: Array,
    context: AttentionContext,
    cache: KVCache,
) -> tuple[KVCache, Array]:
    """The longer cache, and the new tokens' segments [B, T]."""
    segments = context.segments
    if segments is None:
        segments = (context.positions >= 0).astype(jnp.int32)
    put = lax.dynamic_update_slice_in_dim
    start = cache.length

    def heads_first(x: Array, like: Array) -> Array:
        return jnp.moveaxis(x, 1, 2).astype(like.dtype)

    longer = KVCache(
        k=put(cache.k, heads_first(k, cache.k), start, axis=2),
        v=put(cache.v, heads_first(v, cache.v), start, axis=2),
        positions=put(cache.positions, context.positions.astype(jnp.int32), start, axis=1),
        segments=put(cache.segments, segments.astype(jnp.int32), start, axis=1),
        length=start + k.shape[1],
    )
    return longer, segments


def over_keys(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
) -> Array:
    """Attention of a few queries over whole rows of a cache.

    Both matmuls read the cache in its own type and add up in at least float32: to convert it first
    would write and read it once more, and reading it is what a decoding step spends its time on.

    Args:
        q: [B, T, N, H].
        k: [B, K, S, H], heads before slots.
        v: [B, K, S, H].
        context: with the positions of the keys.
    Returns:
        [B, T, N, H] in the type of `q`.
    """
    num_kv_heads = k.shape[1]
    q_BTKGH = q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[3]).astype(k.dtype)
    # Heads first, as in the cache: XLA would order the logits [B, K, S, G, T] otherwise, and not
    # make one kernel of the softmax, whose sums would be over a dim that is not the last one.
    q_BKGTH = jnp.moveaxis(q_BTKGH, 1, 3)
    logits = _wide_product("bkgth,bksh->bkgts", q_BKGTH, k)
    logits *= context.logits_scale(q.shape[3])
    if context.softcap is not None:
        logits = context.softcap * jnp.tanh(logits / context.softcap)
    mask = context.mask(q.shape[2])
    num_groups = q_BKGTH.shape[2] if context.layout else 1
    mask = mask.reshape(mask.shape[0], -1, num_groups, *mask.shape[2:])
    weights = jax.nn.softmax(jnp.where(mask, logits, NEVER)).astype(v.dtype)
    o = _wide_product("bkgts,bksh->btkgh", weights, v)
    return o.reshape(q.shape).astype(q.dtype)


def _wide_product(equation: str, x: Array, y: Array) -> Array:
    """An einsum whose sums and result are in at least float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if jax.default_backend() == "cpu":
        # XLA has no batched matmul there that takes bfloat16 and gives float32.
        x, y = x.astype(wide), y.astype(wide)
    return jnp.einsum(equation, x, y, preferred_element_type=wide)
