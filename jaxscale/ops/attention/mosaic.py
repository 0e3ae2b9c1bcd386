"""Our attention kernel for Hopper GPUs, for float16 and bfloat16."""

from jaxscale.kernels.attention import api as kernel
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.types import Array

# The name of what the kernel computed, for rematerialisation policies.
OUTPUT = kernel.OUTPUT_NAME


def attend(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
) -> Array:
    """Attention that skips tiles of other documents or outside the window; else as `attention`."""
    o, _ = kernel.attention(
        q,
        k,
        v,
        *context.key_intervals(),
        scale=context.logits_scale(q.shape[3]),
        softcap=context.softcap,
        layout=context.layout,
        implementation="mosaic",
    )
    return o


def refusal(q: Array, context: AttentionContext) -> str | None:
    """What of the request the kernel cannot do, as the text of an error; None when it can."""
    if not context.is_aligned:
        return "a backend that takes keys at other positions than the queries'"
    if context.layout is not None and (context.segments is not None or context.window is not None):
        return "a backend that combines a layout of blocks with documents or a window"
    return kernel.mosaic_refusal(q, q)
