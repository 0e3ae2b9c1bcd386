"""The slow twin of the linear cross-entropy."""

import jax
import jax.numpy as jnp
from jax import Array


def label_and_normaliser(
    h: Array,
    head: Array,
    labels: Array,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """As `api.label_and_normaliser`, with all logits in at least float32."""
    wide = jnp.promote_types(h.dtype, jnp.float32)
    h, head = h.astype(wide), head.astype(wide)
    logits = jnp.einsum("td,vd->tv", h, head, precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        # A forbidden word's logit is a constant, so that h and its row have no gradient of it.
        logits = jnp.where(bias == -jnp.inf, -jnp.inf, logits + bias)
    is_label = jnp.arange(head.shape[0]) == labels[:, None]
    label = jnp.where(is_label, logits, 0).sum(-1)
    is_any = (logits != -jnp.inf).any(-1)
    normaliser = jax.nn.logsumexp(jnp.where(is_any[:, None], logits, 0), -1)
    return label, jnp.where(is_any, normaliser, -jnp.inf)
