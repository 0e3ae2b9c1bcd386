"""Attention over one block of a sequence's keys, with what adding blocks up needs.

Ring attention and sequences that do not fit in memory see their keys block by block.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.attention.blocks import joined, split
from jaxscale.ops.attention.chunked import QUERY_CHUNK
from jaxscale.ops.attention.context import NEVER, AttentionContext
from jaxscale.ops.attention.cudnn import head_refusal
from jaxscale.ops.device import device_refusal
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, InputError, check_choice

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cudnn")


def forward(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    implementation: str,
) -> tuple[Array, Array]:
    """Attention over a block of keys, with the logarithm of the softmax's denominator.

    Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), section 3.1.1; its L is our lse.
    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H], N a multiple of K.
        context: the mask structure. "cudnn" does not look at positions: where the context is
            aligned it takes the order of the tokens; elsewhere the caller vouches that every key
            comes before every query.
        implementation: one of BACKENDS.
    Returns:
        (o [B, T, N, H], lse [B, T, N]), both in at least float32. A query that sees no key has
        o = 0 and lse = NEVER.
    """
    backends = {"reference": _reference_forward, "cudnn": _cudnn_forward}
    return backends[implementation](q, k, v, context)


def backward(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    o: Array,
    lse: Array,
    do: Array,
    implementation: str,
) -> tuple[Array, Array, Array]:
    """The block's part of the gradients, given the output and denominator over all blocks.

    Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), algorithm 2.
    Args:
        q, k, v, context, implementation: as given to `forward`.
        o: [B, T, N, H] over all blocks.
        lse: [B, T, N] over all blocks.
        do: [B, T, N, H], the cotangent of `o`.
    Returns:
        (dq, dk, dv) in at least float32, shaped as q, k and v.
    """
    backends = {"reference": _reference_backward, "cudnn": _cudnn_backward}
    return backends[implementation](q, k, v, context, o, lse, do)


def choose(q: Array, context: AttentionContext) -> str:
    """The backend for a request that names none; logs it."""
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    reason = device_refusal("cudnn") or _cudnn_refusal(q, context)
    implementation = "cudnn" if is_half and reason is None else "reference"
    logger.info("block attention: backend %s for q%s %s", implementation, q.shape, q.dtype)
    return implementation


def check_backend(
    parameter: str,
    implementation: str,
    q: Array,
    context: AttentionContext,
) -> None:
    """Raises InputError unless the backend is known and can do what is asked; shapes suffice."""
    check_choice(parameter, implementation, BACKENDS)
    if not context.is_causal or context.layout is not None:
        given = "is_causal = False or a layout"
        raise InputError("AttentionContext", given, "a causal mask without layout of blocks")
    if implementation == "cudnn" and (reason := _cudnn_refusal(q, context)):
        raise InputError(parameter, implementation, reason)


def _reference_forward(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
) -> tuple[Array, Array]:
    def of_chunk(
        _: None,
        q: Array,
        part: AttentionContext,
    ) -> tuple[None, tuple[Array, Array]]:
        logits, visible, _ = _logits(q, k, part)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.where(visible, jnp.exp(logits - top), 0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total > 0, total, 1)
        o = jnp.einsum("bkgts,bskh->btkgh", weights / total, accumulator(v))
        lse = top + jnp.log(total)
        return None, (o.reshape(q.shape), _heads_last(lse))

    _, results = _over_queries(of_chunk, None, (q,), context)
    return results


def _reference_backward(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    o: Array,
    lse: Array,
    do: Array,
) -> tuple[Array, Array, Array]:
    k_wide, v_wide = accumulator(k), accumulator(v)

    def of_chunk(
        sums: Any,
        q: Array,
        delta: Array,
        lse: Array,
        do: Array,
        part: AttentionContext,
    ):
        dk_sum, dv_sum = sums
        logits, visible, slope = _logits(q, k, part)
        do = _grouped(accumulator(do), k)
        logits = logits - _heads_first(lse, k)
        weights = jnp.exp(jnp.where(visible, logits, NEVER))
        dweights = jnp.einsum("btkgh,bskh->bkgts", do, v_wide)
        dlogits = weights * (dweights - _heads_first(delta, k))
        dlogits = dlogits * slope * part.logits_scale(q.shape[-1])
        dk = jnp.einsum("bkgts,btkgh->bskh", dlogits, _grouped(accumulator(q), k))
        dv = jnp.einsum("bkgts,btkgh->bskh", weights, do)
        sums = dk_sum + dk, dv_sum + dv
        dq = jnp.einsum("bkgts,bskh->btkgh", dlogits, k_wide)
        return sums, dq.reshape(q.shape)

    delta = jnp.sum(accumulator(o) * accumulator(do), axis=-1)
    zeros = jnp.zeros_like(k_wide), jnp.zeros_like(v_wide)
    (dk, dv), dq = _over_queries(of_chunk, zeros, (q, delta, lse, do), context)
    return dq, dk, dv


def _logits(
    q: Array,
    k: Array,
    context: AttentionContext,
) -> tuple[Array, Array, Array | float]:
    """(masked logits [B, K, G, T, S], which of them are visible, slope of the soft-cap)."""
    q_BTKGH = _grouped(accumulator(q), k)
    logits = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, accumulator(k))
    logits = logits * context.logits_scale(q.shape[-1])
    slope = 1.0
    if context.softcap is not None:
        capped = jnp.tanh(logits / context.softcap)
        logits = context.softcap * capped
        slope = 1 - capped**2
    visible = context.mask()[:, :, None]
    return jnp.where(visible, logits, NEVER), visible, slope


def _over_queries(
    f: Callable,
    carry: Any,
    arrays: tuple[Array, ...],
    context: AttentionContext,
) -> tuple[Any, Any]:
    """Scans f(carry, *arrays, context) over chunks of queries.

    Only [chunk, S] logits exist at a time.

    Args:
        f: -> (carry, results [B, chunk, ...]).
        carry: what the first chunk gets.
        arrays: [B, T, ...].
    Returns:
        (last carry, results [B, T, ...]).
    """
    length = context.positions.shape[1]
    size = min(length, QUERY_CHUNK)
    keyed = context
    if context.is_aligned:
        keyed = dataclasses.replace(
            context,
            key_positions=context.positions,
            key_segments=context.segments,
        )

    def of_chunk(carry: Any, chunk: tuple):
        *arrays, positions, segments = chunk
        part = dataclasses.replace(keyed, positions=positions, segments=segments)
        return f(carry, *arrays, part)

    segments = None if context.segments is None else split(context.segments, 1, size)
    arrays = tuple(split(x, 1, size) for x in arrays)
    # No key comes before position -1, so what fills the last chunk sees none.
    positions = split(context.positions, 1, size, fill=-1)
    carry, results = lax.scan(of_chunk, carry, (*arrays, positions, segments))
    return carry, jax.tree.map(lambda x: joined(x, 1, length), results)


def _grouped(q: Array, k: Array) -> Array:
    """[B, T, N, H] -> [B, T, K, G, H]."""
    batch, length, num_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    return q.reshape(batch, length, kv_heads, num_heads // kv_heads, head_dim)


def _heads_first(x: Array, k: Array) -> Array:
    """[B, T, N] -> [B, K, G, T, 1]."""
    batch, length, num_heads = x.shape
    kv_heads = k.shape[2]
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(batch, kv_heads, num_heads // kv_heads, length, 1)


def _heads_last(x: Array) -> Array:
    """[B, K, G, T, 1] -> [B, T, N]."""
    x = x.reshape(x.shape[0], -1, x.shape[3])
    return jnp.moveaxis(x, 1, 2)


def _cudnn_forward(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
) -> tuple[Array, Array]:
    cudnn, mask_type = _cudnn(context)
    o, lse = cudnn.dot_product_attention(
        q,
        k,
        v,
        scale=context.logits_scale(q.shape[-1]),
        mask_type=mask_type,
        return_residual=True,
    )
    return accumulator(o), jnp.moveaxis(lse, 1, 2)


def _cudnn_backward(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    o: Array,
    lse: Array,
    do: Array,
) -> tuple[Array, Array, Array]:
    cudnn, mask_type = _cudnn(context)
    # Bias, lengths and offsets of documents, page tables.
    unused = jnp.zeros(0, q.dtype)
    gradients = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        q,
        k,
        v,
        *(unused,) * 7,
        jnp.moveaxis(lse, 1, 2),
        o.astype(q.dtype),
        do.astype(q.dtype),
        scale=context.logits_scale(q.shape[-1]),
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=mask_type,
        layout=cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=None,
    )
    return tuple(map(accumulator, gradients))


def _cudnn(context: AttentionContext) -> tuple[Any, Any]:
    """JAX's binding of cuDNN, and the mask it is asked for.

    The binding is private. The public `jax.nn.dot_product_attention` rounds the lse that it returns
    to q's type, which is too coarse to add blocks up, and has no way to give its backward the lse
    of all blocks.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    mask_type = cudnn.MaskType.CAUSAL if context.is_aligned else cudnn.MaskType.NO_MASK
    return cudnn, mask_type


def _cudnn_refusal(q: Array, context: AttentionContext) -> str | None:
    """What cuDNN would need to compute the request, as the text of an error; None when it can."""
    if context.softcap is not None:
        return "a backend with soft-cap (cuDNN has none)"
    if context.segments is not None or context.window is not None:
        return 'a backend that reads documents and windows off positions, such as "reference"'
    return head_refusal(q.shape[3])
