"""The slow twin of attention over pages."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout
from jaxscale.kernels.paged_attention.ragged import Sequences


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    low: Array,
    high: Array,
    scales: tuple[Array, Array] | None = None,
    mask: Array | None = None,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
) -> Array:
    """As `api.paged_attention`, with all keys gathered and all logits in at least float32."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    num, num_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    grouped = q.astype(wide).reshape(num, kv_heads, num_heads // kv_heads, head_dim)
    keys, values = (pages[block_table].astype(wide) for pages in (k_pages, v_pages))
    if scales is not None:
        of_keys, of_values = scales
        keys *= _along_pages(of_keys[block_table])
        values *= _along_pages(of_values[block_table])
    keys, values = (x.reshape(num, -1, kv_heads, head_dim) for x in (keys, values))
    logits = jnp.einsum("dkgh,dskh->dkgs", grouped, keys, precision=highest) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    key = jnp.arange(keys.shape[1])
    sees = (key >= low[:, None]) & (key < high[:, None])
    if mask is not None:
        sees &= jnp.repeat(mask, num // len(mask), 0)
    sees = sees[:, None, None]
    if layout is not None:
        sees = sees & _seen_by_layout(layout, q, high - 1, key).reshape(*logits.shape)
    finite = jnp.where(sees, logits, jnp.finfo(wide).min)
    p = jnp.where(sees, jnp.exp(finite - finite.max(-1, keepdims=True)), 0)
    total = p.sum(-1, keepdims=True)
    p = p / jnp.where(total == 0, 1, total)
    o = jnp.einsum("dkgs,dskh->dkgh", p, values, precision=highest)
    return o.reshape(q.shape).astype(q.dtype)


def write_and_attend(
    q: Array,
    new: tuple[Array, Array],
    pages: tuple[Array, Array],
    block_table: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """As `api.write_and_attend`, one write behind the other."""
    num_pages, page_size = pages[0].shape[:2]
    last = jnp.maximum(high - 1, 0)
    page = jnp.take_along_axis(block_table, last[:, None] // page_size, 1)[:, 0]
    page = jnp.where(high > low, page, num_pages)  # out of bounds: not written
    k_pages, v_pages = (
        kept.at[page, last % page_size].set(x, mode="drop")
        for kept, x in zip(pages, new, strict=True)
    )
    settings = dict(scale=scale, softcap=softcap, layout=layout)
    o = paged_attention(q, k_pages, v_pages, block_table, low, high, **settings)
    return o, (k_pages, v_pages)


def ragged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    pages: Array,
    sequences: Sequences,
    scales: tuple[Array, Array] | None = None,
    *,
    num_single: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
) -> Array:
    """As `api.ragged_attention`: each token is a sequence of its own, with all pages."""
    del num_single
    token = jnp.arange(len(q))
    place = token[:, None] - sequences.first_token
    is_own = (place >= 0) & (place < sequences.num_tokens)
    owner = is_own.argmax(1)
    high = jnp.where(is_own.any(1), (sequences.position + place)[token, owner] + 1, 0)
    low = jnp.zeros_like(high) if window is None else jnp.maximum(high - window, 0)
    places = sequences.first_page[owner][:, None] + jnp.arange(len(pages))
    table = pages[jnp.minimum(places, len(pages) - 1)]
    settings = dict(scale=scale, softcap=softcap, layout=layout)
    return paged_attention(q, k_pages, v_pages, table, low, high, scales, **settings)


def _seen_by_layout(
    layout: BlockLayout,
    q: Array,
    position: Array,
    key: Array,
) -> Array:
    """[D, N, S] whether a head of the query at `position` [D] sees the block of a key [S]."""
    by_block = jnp.asarray(layout.sees(-(-len(key) // BLOCK)))
    of_query = by_block[:, jnp.maximum(position, 0) // BLOCK]  # [patterns, D, blocks]
    pattern = jnp.arange(q.shape[1]) % layout.stride
    return jnp.swapaxes(of_query[pattern], 0, 1)[..., key // BLOCK]


def _along_pages(scales: Array) -> Array:
    """Scales [D, P, 1, K, page size] as [D, P, page size, K, 1]."""
    return jnp.swapaxes(scales, 2, 4)
