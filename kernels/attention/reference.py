"""The slow twin of the attention kernels."""

import jax
import jax.numpy as jnp

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    low: jax.Array,
    high: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `api.attention`: all logits in at least float32."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    groups = q.shape[2] // k.shape[2]
    keys, values = (jnp.repeat(x.astype(wide), groups, axis=2) for x in (k, v))
    logits = (
        jnp.einsum("btnh,bsnh->bnts", q.astype(wide), keys, precision=jax.lax.Precision.HIGHEST)
        * scale
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    number = jnp.arange(k.shape[1])
    sees = (number >= low[:, None, :, None]) & (number < high[:, None, :, None])
    if layout is not None:
        blocks = jnp.asarray(layout.sees(-(-max(q.shape[1], k.shape[1]) // BLOCK)))
        by_token = blocks[:, jnp.arange(q.shape[1])[:, None] // BLOCK, number // BLOCK]
        sees &= by_token[jnp.arange(q.shape[2]) % layout.stride]
    logits = jnp.where(sees, logits, -jnp.inf)
    sees_any = sees.any(-1)
    # Where nothing is seen the softmax and its gradient would be NaN.
    lse = jax.nn.logsumexp(jnp.where(sees_any[..., None], logits, 0), -1)
    p = jnp.where(sees, jnp.exp(jnp.where(sees, logits, 0) - lse[..., None]), 0)
    o = jnp.einsum("bnts,bsnh->btnh", p, values, precision=jax.lax.Precision.HIGHEST)
    return o.astype(q.dtype), jnp.where(sees_any, lse, -jnp.inf)
