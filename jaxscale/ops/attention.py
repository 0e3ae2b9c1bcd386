"""Attention: one call with its mask structure, and the backends behind it."""

import dataclasses
import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.attention import api as kernel
from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout
from jaxscale.ops.device import is_hopper
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, InputError, check_choice

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "chunked", "cudnn", "mosaic")
DETERMINISTIC = ("reference", "chunked")  # the others' backward adds up in whatever order its blocks finish
KERNEL_OUTPUT = kernel.OUTPUT_NAME  # names what "mosaic" computed, for rematerialisation
QUERY_CHUNK = 512
NEVER = -1e30  # finite, so that a fully masked row has a finite (and unused) softmax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "segments", "key_positions", "key_segments"],
    meta_fields=["window", "softcap", "scale", "is_causal", "layout"],
)
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """Who may attend to whom: queries see keys of their segment; in a causal mask, at positions (p - window, p].

    Args:
        positions: [B, T] position of each query within its document, rising along T.
        segments: [B, T] document number, 0 for padding; None when a row is one document. Ulysses then takes all rows to
            have the same positions: whoever pads rows on a mesh gives segments.
        key_positions: [B, S] positions of the keys, negative where a slot is empty; None when the keys are the
            queries' own tokens in the same order (then backends may use that order).
        key_segments: [B, S] or None, as `segments`.
        window: number of keys a query of a causal mask sees, itself included; None for all.
        softcap: c in c * tanh(logits / c); None for none.
        scale: factor on the logits; None for 1 / sqrt(H).
        is_causal: whether a query sees no later key.
        layout: which blocks of BLOCK positions see which in each head, of a causal mask; None for all.
    """

    positions: Array
    segments: Array | None = None
    key_positions: Array | None = None
    key_segments: Array | None = None
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    is_causal: bool = True
    layout: BlockLayout | None = None

    @property
    def is_aligned(self) -> bool:
        """Whether the keys are the queries' own tokens in the same order."""
        return self.key_positions is None

    def mask(self, num_heads: int = 1) -> Array:
        """The dense mask [B, 1, T, S], or [B, N, T, S] if heads differ; True where a query may see a key."""
        key_positions = self.positions if self.is_aligned else self.key_positions
        key_segments = self.segments if self.is_aligned else self.key_segments
        distance = self.positions[:, :, None] - key_positions[:, None, :]
        visible = (key_positions >= 0)[:, None, :] & (distance >= 0 if self.is_causal else True)
        if self.window is not None:
            visible &= distance < self.window
        if self.segments is not None:
            visible &= self.segments[:, :, None] == key_segments[:, None, :]
        visible = jnp.broadcast_to(visible, distance.shape)[:, None]
        if self.layout is None:
            return visible
        sees = jnp.asarray(self.layout.sees(-(-max(distance.shape[1:]) // BLOCK)))
        by_pattern = sees[:, self.positions[:, :, None] // BLOCK, key_positions[:, None, :] // BLOCK]
        return visible & jnp.moveaxis(by_pattern, 0, 1)[:, jnp.arange(num_heads) % self.layout.stride]

    def key_intervals(self) -> tuple[Array, Array]:
        """[B, T] int32 low and high of an aligned context: token t sees low <= s < high, in the tokens' order."""
        length = self.positions.shape[1]
        token = jnp.arange(length, dtype=jnp.int32)
        low, high = jnp.zeros_like(token)[None], jnp.full_like(token, length)[None]
        if self.segments is not None:
            changes = self.segments[:, 1:] != self.segments[:, :-1]
            low = lax.cummax(jnp.where(jnp.pad(changes, ((0, 0), (1, 0))), token, 0), axis=1)
            ends = jnp.where(jnp.pad(changes, ((0, 0), (0, 1))), token + 1, length)
            high = lax.cummin(ends, axis=1, reverse=True)
        if self.window is not None:
            low = jnp.maximum(low, token - self.window + 1)
        return low, jnp.broadcast_to(token + 1 if self.is_causal else high, low.shape)


def attention(
    q: Array, k: Array, v: Array, context: AttentionContext, cache: None = None, *, implementation: str | None = None
) -> tuple[Array, None]:
    """Softmax attention of each query over the keys that `context` lets it see.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; grouped queries as in arXiv 2305.13245.
    Args:
        q: [B, T, N, H].
        k: [B, S, K, H], N a multiple of K; query head n reads kv head n // (N / K).
        v: [B, S, K, H].
        context: the mask structure.
        cache: None: this callable keeps no keys between calls (see `kv_cache.attend` for one that does).
        implementation: one of BACKENDS; None picks one and logs it. "mosaic" is not divided by the compiler: where
            arrays lie on several devices, call it inside `shard_map` (as train steps do), or name another.
    Returns:
        ([B, T, N, H] in the type of `q`, None).
    Raises:
        InputError: shapes do not fit one another, the mask makes no sense, or the named backend is unknown or cannot
            do what is asked; there is no silent fallback.
    """
    _check(q, k, v, context)
    if implementation is None:
        implementation = _choose(q, context)
        logger.info("attention: backend %s for q%s k%s %s", implementation, q.shape, k.shape, q.dtype)
    check_backend("attention", implementation, q, context)
    backends = {"reference": reference, "chunked": chunked, "cudnn": cudnn, "mosaic": mosaic}
    return backends[implementation](q, k, v, context), cache


def _check(q: Array, k: Array, v: Array, context: AttentionContext) -> None:
    """Raises InputError for shapes that do not fit and masks that make no sense."""
    shapes = f"q {q.shape}, k {k.shape} and v {v.shape}"
    is_fit = k.shape == v.shape and (k.shape[0], k.shape[3]) == (q.shape[0], q.shape[3]) and not q.shape[2] % k.shape[2]
    if not is_fit:
        raise InputError("attention", shapes, "q [B, T, N, H], k and v [B, S, K, H] with N % K == 0")
    if context.is_aligned and k.shape[1] != q.shape[1]:
        raise InputError("AttentionContext.key_positions", None, f"[B, S] where S is not T, as in {shapes}")
    if context.segments is not None and not context.is_aligned and context.key_segments is None:
        raise InputError("AttentionContext.key_segments", None, "[B, S] where there are segments and key_positions")
    if context.window is not None and context.window < 1:
        raise InputError("AttentionContext.window", context.window, "1 or more, for a query sees its own key, or None")
    if context.softcap is not None and not context.softcap > 0:  # so that NaN fails too
        raise InputError("AttentionContext.softcap", context.softcap, "above 0, or None")
    if not context.is_causal and (context.window is not None or context.layout is not None):
        raise InputError("AttentionContext.is_causal", False, "True where there is a window or a layout of blocks")


def check_backend(parameter: str, implementation: str, q: Array, context: AttentionContext) -> None:
    """Raises InputError unless the backend is known and can do what is asked; shapes are enough."""
    check_choice(parameter, implementation, BACKENDS)
    refusals = {"chunked": _chunked_refusal, "cudnn": _cudnn_refusal, "mosaic": _mosaic_refusal}
    if implementation in refusals and (reason := refusals[implementation](q, context)):
        raise InputError(parameter, implementation, reason)


def _choose(q: Array, context: AttentionContext) -> str:
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    is_ours = any(each is not None for each in (context.segments, context.softcap, context.layout))
    # As measured on an H200: 512 to 32,768 tokens, 8 or 32 kv heads (experiments/results/2026-11-24_h200_attention.md).
    is_faster = context.is_causal and context.window is None and q.shape[3] == 128
    if is_hopper() and (is_ours or is_faster) and _mosaic_refusal(q, context) is None:
        return "mosaic"  # for documents cuDNN takes a dense mask; soft-cap and layout it has not
    if jax.default_backend() == "gpu" and is_half and _cudnn_refusal(q, context) is None:
        return "cudnn"
    return "chunked" if q.shape[1] > QUERY_CHUNK and _chunked_refusal(q, context) is None else "reference"


def reference(q: Array, k: Array, v: Array, context: AttentionContext) -> Array:
    """The slow twin: dense logits and mask in at least float32; arguments as `attention`."""
    groups = q.shape[2] // k.shape[2]
    q32, k32, v32 = accumulator(q), accumulator(k), accumulator(v)
    q_BTKGH = q32.reshape(*q.shape[:2], k.shape[2], groups, q.shape[3])
    logits = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k32) * _scale(q, context)
    if context.softcap is not None:
        logits = context.softcap * jnp.tanh(logits / context.softcap)
    mask = context.mask(q.shape[2])
    mask = mask.reshape(mask.shape[0], -1, groups if context.layout else 1, *mask.shape[2:])
    logits = jnp.where(mask, logits, NEVER)
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(logits), v32).reshape(q.shape).astype(q.dtype)


def chunked(q: Array, k: Array, v: Array, context: AttentionContext) -> Array:
    """The reference over QUERY_CHUNK queries at a time, recomputed in the backward: memory [chunk, S], any device."""
    num_chunks = q.shape[1] // QUERY_CHUNK
    key_positions = context.positions if context.is_aligned else context.key_positions
    key_segments = context.segments if context.is_aligned else context.key_segments

    def split(x: Array | None) -> Array | None:
        return None if x is None else jnp.moveaxis(x.reshape(x.shape[0], num_chunks, QUERY_CHUNK, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(chunk: tuple[Array, Array, Array | None]) -> Array:
        q_chunk, positions, segments = chunk
        part = dataclasses.replace(
            context, positions=positions, segments=segments, key_positions=key_positions, key_segments=key_segments
        )
        return reference(q_chunk, k, v, part)

    out = lax.map(one, (split(q), split(context.positions), split(context.segments)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def cudnn(q: Array, k: Array, v: Array, context: AttentionContext) -> Array:
    """cuDNN's fused attention (float16 or bfloat16 on NVIDIA GPUs); documents go through a dense mask."""
    window = None if context.window is None else (context.window - 1, 0)
    same_document = None
    if context.segments is not None:
        same_document = (context.segments[:, :, None] == context.segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=same_document, is_causal=context.is_causal, local_window_size=window, scale=_scale(q, context),
        implementation="cudnn",
    )  # fmt: skip


def mosaic(q: Array, k: Array, v: Array, context: AttentionContext) -> Array:
    """Our kernel for Hopper GPUs (float16 or bfloat16): tiles of other documents or outside the window are left out."""
    settings = dict(scale=_scale(q, context), softcap=context.softcap, layout=context.layout, implementation="mosaic")
    return kernel.attention(q, k, v, *context.key_intervals(), **settings)[0]


def _chunked_refusal(q: Array, context: AttentionContext) -> str | None:
    """What of the request "chunked" cannot do, as the text of an error; None when it can."""
    return f"T % {QUERY_CHUNK} == 0, but T = {q.shape[1]}" if q.shape[1] % QUERY_CHUNK else None


def _cudnn_refusal(q: Array, context: AttentionContext) -> str | None:
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


def _mosaic_refusal(q: Array, context: AttentionContext) -> str | None:
    """What of the request "mosaic" cannot do, as the text of an error; None when it can."""
    if not context.is_aligned:
        return "a backend that takes keys at other positions than the queries'"
    if context.layout is not None and (context.segments is not None or context.window is not None):
        return "a backend that combines a layout of blocks with documents or a window"
    return kernel.mosaic_refusal(q, q)


def _scale(q: Array, context: AttentionContext) -> float:
    return 1 / math.sqrt(q.shape[-1]) if context.scale is None else context.scale
