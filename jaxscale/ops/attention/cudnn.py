"""cuDNN's fused attention, for float16 and bfloat16 on NVIDIA GPUs."""

import jax

from jaxscale.ops.attention.context import AttentionContext
from jaxscale.types import Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
) -> Array:
    """Attention by cuDNN; documents go through a dense mask; else as `ops.attention.attention`."""
    same_document = None
    if context.segments is not None:
        same_document = context.segments[:, :, None] == context.segments[:, None, :]
        same_document = same_document[:, None]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=same_document,
        is_causal=context.is_causal,
        local_window_size=None if context.window is None else (context.window - 1, 0),
        scale=context.logits_scale(q.shape[3]),
        implementation="cudnn",
    )


def refusal(q: Array, context: AttentionContext) -> str | None:
    """What of the request cuDNN cannot do, as the text of an error; None when it can."""
    if context.softcap is not None:
        return "a backend with soft-cap (cuDNN has none)"
    if context.layout is not None:
        return "a backend with layouts of blocks (cuDNN has none)"
    if not context.is_aligned:
        return "a backend that takes keys at other positions than the queries'"
    if context.segments is not None and q.shape[1] % 2:
        return f"T % 2 == 0 where rows hold documents, but T = {q.shape[1]}"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"head_dim % 8 == 0 and head_dim <= 256, but head_dim = {q.shape[3]}"
    return None
