"""The slow twin of attention over pages."""

import jax
import jax.numpy as jnp
from jax import Array


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    low: Array,
    high: Array,
    scales: tuple[Array, Array] | None = None,
    *,
    scale: float,
    softcap: float | None,
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
    sees = sees[:, None, None]
    finite = jnp.where(sees, logits, jnp.finfo(wide).min)
    p = jnp.where(sees, jnp.exp(finite - finite.max(-1, keepdims=True)), 0)
    total = p.sum(-1, keepdims=True)
    p = p / jnp.where(total == 0, 1, total)
    o = jnp.einsum("dkgs,dskh->dkgh", p, values, precision=highest)
    return o.reshape(q.shape).astype(q.dtype)


def _along_pages(scales: Array) -> Array:
    """Scales [D, P, 1, K, page size] as [D, P, page size, K, 1]."""
    return jnp.swapaxes(scales, 2, 4)
