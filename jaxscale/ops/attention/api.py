"""Attention as models call it: its checks and the choice of a backend."""

import logging

import jax
import jax.numpy as jnp

from jaxscale.ops.attention import chunked, cudnn, invariant, kernels, reference, splash
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.ops.device import device_refusal, is_taken, kernel_family, named_kernels
from jaxscale.types import Array, InputError, check_choice

logger = logging.getLogger(__name__)

MODULES = {
    "reference": reference,
    "chunked": chunked,
    "cudnn": cudnn,
    "mosaic": kernels.Kernel("mosaic"),
    "triton": kernels.Kernel("triton"),
    "splash": splash,
    "invariant": invariant,
}
BACKENDS = tuple(MODULES)
# The backward of the others adds up in whatever order its blocks finish.
DETERMINISTIC = ("reference", "chunked", "invariant", "triton")
KERNEL_OUTPUT = kernels.OUTPUT


def attention(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    cache: None = None,
    *,
    implementation: str | None = None,
) -> tuple[Array, None]:
    """Softmax attention of each query over the keys that `context` lets it see.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; grouped queries as in
        arXiv 2305.13245.
    Args:
        q: [B, T, N, H].
        k: [B, S, K, H], N a multiple of K; query head n reads kv head n // (N / K).
        v: [B, S, K, H].
        context: the mask structure.
        cache: None: this callable keeps no keys between calls (`ops.attention.cache` does).
        implementation: one of BACKENDS; None picks one and logs it. The compiler does not divide
            "mosaic" and "triton": where arrays lie on several devices, call them inside `shard_map`
            (as train steps do), or name another.
    Returns:
        ([B, T, N, H] in the type of `q`, None).
    Raises:
        InputError: shapes do not fit one another, the mask makes no sense, or the named backend
            is unknown or cannot do what is asked; there is no silent fallback.
    """
    _check(q, k, v, context)
    if implementation is None:
        implementation = _choose(q, context)
        logger.info(
            "attention: backend %s for q%s k%s %s", implementation, q.shape, k.shape, q.dtype
        )
    check_backend("attention", implementation, q, context)
    return MODULES[implementation].attend(q, k, v, context), cache


def check_backend(
    parameter: str,
    implementation: str,
    q: Array,
    context: AttentionContext,
) -> None:
    """Refuses a backend that is not known or cannot do what is asked; shapes suffice.

    Args:
        parameter: that names it, for the error.
        implementation: its name.
        q: [B, T, N, H].
        context: mask structure.
    Raises:
        InputError: with the reason.
    """
    check_choice(parameter, implementation, BACKENDS)
    if implementation == "reference":
        return
    reason = MODULES[implementation].refusal(q, context) or device_refusal(implementation)
    if reason:
        raise InputError(parameter, implementation, reason)


def _check(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
) -> None:
    """Raises InputError for shapes that do not fit and masks that make no sense."""
    shapes = f"q {q.shape}, k {k.shape} and v {v.shape}"
    is_same_batch = k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3]
    if k.shape != v.shape or not is_same_batch or q.shape[2] % k.shape[2]:
        expected = "q [B, T, N, H], k and v [B, S, K, H] with N % K == 0"
        raise InputError("attention", shapes, expected)
    if context.is_aligned and k.shape[1] != q.shape[1]:
        expected = f"[B, S] where S is not T, as in {shapes}"
        raise InputError("AttentionContext.key_positions", None, expected)
    if not context.is_aligned and context.segments is not None and context.key_segments is None:
        expected = "[B, S] where there are segments and key_positions"
        raise InputError("AttentionContext.key_segments", None, expected)
    if context.window is not None and context.window < 1:
        expected = "1 or more, for a query sees its own key, or None"
        raise InputError("AttentionContext.window", context.window, expected)
    if context.softcap is not None and not context.softcap > 0:  # so that NaN fails too
        raise InputError("AttentionContext.softcap", context.softcap, "above 0, or None")
    if not context.is_causal and (context.window is not None or context.layout is not None):
        expected = "True where there is a window or a layout of blocks"
        raise InputError("AttentionContext.is_causal", False, expected)


def _choose(q: Array, context: AttentionContext) -> str:
    """The fastest backend that can do what is asked.

    As measured on an H200 for 512 to 32,768 tokens and 8 or 32 kv heads
    (experiments/results/2026-11-24_h200_attention.md).
    """
    # cuDNN takes a dense mask for documents, and has neither soft-cap nor layouts of blocks.
    only_ours = (context.segments, context.softcap, context.layout)
    is_ours = any(each is not None for each in only_ours)
    family = kernel_family()
    is_plain = context.is_causal and context.window is None
    is_faster = family == "mosaic" and is_plain and q.shape[3] == 128
    is_wanted = is_ours or is_faster or named_kernels()
    has_kernel = family in MODULES and is_taken(
        "attention", family, MODULES[family].refusal(q, context)
    )
    if has_kernel and is_wanted:
        return family
    if jax.default_backend() == "tpu" and splash.refusal(q, context) is None:
        return "splash"
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    reason = device_refusal("cudnn") or cudnn.refusal(q, context)
    if is_half and reason is None:
        return "cudnn"
    if has_kernel:
        return family
    is_long = q.shape[1] > chunked.QUERY_CHUNK
    return "chunked" if is_long and chunked.refusal(q, context) is None else "reference"
