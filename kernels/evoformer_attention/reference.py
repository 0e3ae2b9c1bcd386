"""The slow twin of the Evoformer's attention: all logits at once, in at least float32."""

import jax.numpy as jnp
from jax import Array, lax


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask_bias: Array | None,
    pair_bias: Array | None,
) -> Array:
    """softmax(q k^T / sqrt(H) + mask bias + pair bias) v; as `api.evoformer_attention`."""
    logits = jnp.einsum("bmtnh,bmsnh->bmnts", _wide(q), _wide(k))
    logits *= q.shape[-1] ** -0.5
    for bias in (mask_bias, pair_bias):
        if bias is not None:
            logits += _wide(bias)
    top = lax.stop_gradient(logits.max(-1, keepdims=True, initial=-jnp.inf))
    # A query that sees no key has logits of -inf alone, and -inf - -inf would be NaN.
    weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    weights /= jnp.where(total == 0, 1, total)
    return jnp.einsum("bmnts,bmsnh->bmtnh", weights, _wide(v)).astype(q.dtype)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
