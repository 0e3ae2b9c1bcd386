"""Splash attention, the TPU kernel that JAX ships, over causal masks, windows and documents."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from jaxscale.ops.attention.context import AttentionContext
from jaxscale.ops.attention.kernels import OUTPUT
from jaxscale.types import Array

# Tokens in a block: lengths are multiples of the least, and larger blocks read memory less often.
BLOCKS = (512, 256, 128)


def attend(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    *,
    interpret: bool = False,
) -> Array:
    """Attention by Splash; documents by their numbers; else as `ops.attention.attention`.

    Args:
        interpret: whether to run the kernel on a CPU.
    """
    _, length, num_heads, head_dim = q.shape
    size = next(block for block in BLOCKS if length % block == 0)
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([_mask(context, length)] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        attn_logits_soft_cap=context.softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=OUTPUT,
        interpret=interpret,
    )
    # The kernel has no scale of its own.
    q = (q * context.logits_scale(head_dim)).astype(q.dtype)
    by_head = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    segments = context.segments
    documents = None if segments is None else splash.SegmentIds(segments, segments)
    o = jax.vmap(kernel)(*by_head, documents)
    return jnp.swapaxes(o, 1, 2)


def _mask(context: AttentionContext, length: int) -> splash.Mask:
    """What a row without documents sees."""
    shape = length, length
    if context.window is not None:
        return splash.LocalMask(shape, (context.window - 1, 0), offset=0)
    return splash.CausalMask(shape) if context.is_causal else splash.FullMask(shape)


def refusal(q: Array, context: AttentionContext) -> str | None:
    """What of the request Splash cannot do, as the text of an error; None when it can."""
    if context.layout is not None:
        return "a backend with layouts of blocks (Splash has none)"
    if not context.is_aligned:
        return "a backend that takes keys at other positions than the queries'"
    if q.shape[1] % BLOCKS[-1]:
        return f"T % {BLOCKS[-1]} == 0, but T = {q.shape[1]}"
    return None
