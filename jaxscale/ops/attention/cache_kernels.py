"""One new token's attention over a long contiguous cache, by our kernel over pages.

A kv head's slots lie together, so they are pages as they are, of a sequence with one kv head.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.kernels.paged_attention import api as kernel
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.types import Array

PAGE = 64
# Behind 65,536 tokens of Phi-3-mini on an H200 XLA's products read a layer's cache at 2.1 TB/s, the
# kernel at 3.4 with the sum of its streams: it wins 0.17 us a megabyte. That sum was reckoned at
# some 10 us; where the two meet has not been measured.
LONG_BYTES = 2**27
# Kv heads of all rows among which the kernel divides the multiprocessors. 67 of them would leave a
# quarter idle, and for fewer than 8 it would add up more streams than were measured.
NUM_READERS = range(8, 67)


def is_long(shape: tuple[int, int, int, int], itemsize: int) -> bool:
    """Whether the kernel reads the keys and values [B, K, S, H] of a layer faster than XLA."""
    batch, num_kv_heads, capacity, head_dim = shape
    num_readers = batch * num_kv_heads
    num_bytes = 2 * num_readers * capacity * head_dim * itemsize
    return num_readers in NUM_READERS and num_bytes >= LONG_BYTES


def refusal(
    q: Array,
    k: Array,
    context: AttentionContext,
) -> str | None:
    """What the kernel would need, as the text of an error; None when it can.

    Args:
        q: [B, T, N, H].
        k: [B, K, S, H].
        context: of the new tokens.
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads, capacity = k.shape[1:3]
    if length != 1:
        return f"one new token a row, here {length}"
    if context.layout is not None:
        return "a backend for a layout of blocks"
    if capacity % PAGE:
        return f"a capacity % {PAGE} == 0, here {capacity}"
    groups = num_heads // num_kv_heads
    queries = jax.ShapeDtypeStruct((batch * num_kv_heads, groups, head_dim), q.dtype)
    pages = jax.ShapeDtypeStruct((1, PAGE, 1, head_dim), k.dtype)
    return kernel.refusal("mosaic", queries, pages)


def over_slots(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    *,
    interpret: Any = False,
) -> Array:
    """As `cache.over_keys` of one query a row [B, 1, N, H], which may see any set of slots.

    So also between padding that later turns of a chat brought, behind padding on the right, of one
    of several documents whose slots alternate, and of positions in any order. A query that sees
    nothing gets 0. Values must be finite in slots that are not seen, as in `cache.over_keys`.

    The kernel reads the pages between the first slot that is seen and the last one.
    """
    batch, num_kv_heads, capacity, head_dim = k.shape
    mask = context.mask()[:, 0, 0]
    low, high = _bounds(mask)
    num_readers, num_pages = batch * num_kv_heads, capacity // PAGE
    of_heads = (jnp.repeat(bound, num_kv_heads) for bound in (low, high))
    table = jnp.arange(num_readers * num_pages, dtype=jnp.int32)
    return kernel.paged_attention(
        q.reshape(num_readers, -1, head_dim),
        k.reshape(-1, PAGE, 1, head_dim),
        v.reshape(-1, PAGE, 1, head_dim),
        table.reshape(num_readers, num_pages),
        *of_heads,
        mask=mask,
        scale=context.logits_scale(head_dim),
        softcap=context.softcap,
        implementation="mosaic",
        interpret=interpret,
    ).reshape(q.shape)


def _bounds(mask: Array) -> tuple[Array, Array]:
    """(the first slot that is seen, the one behind the last), [B] each, of a mask [B, S]."""
    slots = jnp.arange(mask.shape[1], dtype=jnp.int32)
    low = jnp.where(mask, slots, len(slots)).min(1)
    return low, jnp.where(mask, slots + 1, 0).max(1)
