"""cuDNN's fused attention, for float16 and bfloat16 on NVIDIA GPUs."""

import jax

from jaxscale.kernels import device
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.ops.device import HOPPER
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
    return head_refusal(q.shape[3])


def head_refusal(head_dim: int) -> str | None:
    """As `refusal`, of the size of heads alone, of which older GPUs take less."""
    capability = device.compute_capability() or HOPPER
    widest = 256 if float(capability) >= float(HOPPER) else 128
    if head_dim % 8 or head_dim > widest:
        return f"head_dim % 8 == 0 and head_dim <= {widest}, but head_dim = {head_dim}"
    return None
