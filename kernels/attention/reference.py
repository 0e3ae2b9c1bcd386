"""The slow twin of the attention kernels."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout


def attention(
    q: Array,
    k: Array,
    v: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
) -> tuple[Array, Array]:
    """As `api.attention`, with all logits in at least float32."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    groups = q.shape[2] // k.shape[2]
    keys = jnp.repeat(k.astype(wide), groups, axis=2)
    values = jnp.repeat(v.astype(wide), groups, axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", q.astype(wide), keys, precision=highest)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    key = jnp.arange(k.shape[1])
    is_from_low = key >= low[:, None, :, None]
    is_below_high = key < high[:, None, :, None]
    sees = is_from_low & is_below_high
    if layout is not None:
        sees &= _seen_by_layout(layout, q, key)
    logits = jnp.where(sees, logits, -jnp.inf)
    sees_any = sees.any(-1)
    # Where nothing is seen the softmax and its gradient would be NaN.
    finite = jnp.where(sees_any[..., None], logits, 0)
    lse = jax.nn.logsumexp(finite, -1)
    exponents = jnp.where(sees, logits, 0) - lse[..., None]
    p = jnp.where(sees, jnp.exp(exponents), 0)
    o = jnp.einsum("bnts,bsnh->btnh", p, values, precision=highest)
    o = o.astype(q.dtype)
    return o, jnp.where(sees_any, lse, -jnp.inf)


def _seen_by_layout(layout: BlockLayout, q: Array, key: Array) -> Array:
    """[N, T, S] bool."""
    _, length, num_heads, _ = q.shape
    num_blocks = -(-max(length, key.size) // BLOCK)
    by_block = jnp.asarray(layout.sees(num_blocks))
    query = jnp.arange(length)[:, None]
    by_token = by_block[:, query // BLOCK, key // BLOCK]
    pattern = jnp.arange(num_heads) % layout.stride
    return by_token[pattern]
