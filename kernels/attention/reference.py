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
    logits, sees = _logits(q, k, low, high, scale, softcap, layout)
    logits = jnp.where(sees, logits, -jnp.inf)
    values = _by_query_head(v, q)
    highest = jax.lax.Precision.HIGHEST
    sees_any = sees.any(-1)
    # Where nothing is seen the softmax and its gradient would be NaN.
    finite = jnp.where(sees_any[..., None], logits, 0)
    lse = jax.nn.logsumexp(finite, -1)
    exponents = jnp.where(sees, logits, 0) - lse[..., None]
    p = jnp.where(sees, jnp.exp(exponents), 0)
    o = jnp.einsum("bnts,bsnh->btnh", p, values, precision=highest)
    o = o.astype(q.dtype)
    return o, jnp.where(sees_any, lse, -jnp.inf)


def gradients(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Array, Array, Array]:
    """As `api.gradients`, with all logits in at least float32."""
    logits, sees = _logits(q, k, low, high, scale, softcap, None)
    exponents = jnp.where(sees, logits - lse[..., None], -jnp.inf)
    p = jnp.exp(exponents)
    do = do.astype(p.dtype)
    highest = jax.lax.Precision.HIGHEST
    dp = jnp.einsum("btnh,bsnh->bnts", do, _by_query_head(v, q), precision=highest)
    dlogits = p * (dp - delta[..., None]) * scale
    if softcap is not None:
        dlogits = dlogits * (1 - (logits / softcap) ** 2)
    dq = jnp.einsum("bnts,bsnh->btnh", dlogits, _by_query_head(k, q), precision=highest)
    by_head = (*k.shape[:3], -1, k.shape[3])
    dk = jnp.einsum("bnts,btnh->bsnh", dlogits, q.astype(p.dtype), precision=highest)
    dv = jnp.einsum("bnts,btnh->bsnh", p, do, precision=highest)
    dk, dv = (x.reshape(by_head).sum(3).astype(k.dtype) for x in (dk, dv))
    return dq, dk, dv


def _by_query_head(x: Array, q: Array) -> Array:
    """k or v [B, S, K, H] in at least float32, each head repeated for the queries that read it."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.repeat(x.astype(wide), q.shape[2] // x.shape[2], axis=2)


def _logits(
    q: Array,
    k: Array,
    low: Array,
    high: Array,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None,
) -> tuple[Array, Array]:
    """(logits [B, N, T, S] in at least float32, bool of that shape: which of them are seen)."""
    keys = _by_query_head(k, q)
    highest = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("btnh,bsnh->bnts", q.astype(keys.dtype), keys, precision=highest)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    key = jnp.arange(k.shape[1])
    is_from_low = key >= low[:, None, :, None]
    is_below_high = key < high[:, None, :, None]
    sees = is_from_low & is_below_high
    if layout is not None:
        sees &= _seen_by_layout(layout, q, key)
    return logits, sees


def _seen_by_layout(layout: BlockLayout, q: Array, key: Array) -> Array:
    """[N, T, S] bool."""
    _, length, num_heads, _ = q.shape
    num_blocks = -(-max(length, key.size) // BLOCK)
    by_block = jnp.asarray(layout.sees(num_blocks))
    query = jnp.arange(length)[:, None]
    by_token = by_block[:, query // BLOCK, key // BLOCK]
    pattern = jnp.arange(num_heads) % layout.stride
    return by_token[pattern]
