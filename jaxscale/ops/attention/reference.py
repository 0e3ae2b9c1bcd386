"""The slow twin of attention: dense logits and mask in at least float32."""

import jax
import jax.numpy as jnp

from jaxscale.ops.attention.context import NEVER, AttentionContext
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
) -> Array:
    """Softmax attention; Source, Args and Returns as `ops.attention.attention`."""
    num_rows, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    groups = num_heads // num_kv_heads
    q_BTKGH = accumulator(q).reshape(num_rows, length, num_kv_heads, groups, head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, accumulator(k))
    logits *= context.logits_scale(head_dim)
    if context.softcap is not None:
        logits = context.softcap * jnp.tanh(logits / context.softcap)
    mask = context.mask(num_heads)
    # [B, K or 1, G or 1, T, S]: without a layout all heads see the same.
    own_groups = groups if context.layout else 1
    mask = mask.reshape(mask.shape[0], -1, own_groups, *mask.shape[2:])
    weights = jax.nn.softmax(jnp.where(mask, logits, NEVER))
    o = jnp.einsum("bkgts,bskh->btkgh", weights, accumulator(v))
    return o.reshape(q.shape).astype(q.dtype)
