"""Attention whose result for a query depends on its own keys alone, to the last bit.

Keys are taken in blocks of one size from position 0 upwards and queries in tiles of one size, so
that every product has the same shape whatever else is in the batch. A block of which a query sees
nothing changes none of its sums: they are multiplied by 1, and 0 is added. On a Hopper GPU our
kernels do as much, from the last block downwards.

Source: He 2025, "Defeating nondeterminism in LLM inference" (Thinking Machines Lab), its section on
    batch-invariant attention; the sums are those of FlashAttention-2 (arXiv 2307.08691), section
    3.1.1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.attention.api import refusal as attention_refusal
from jaxscale.kernels.paged_attention.api import refusal as paged_refusal
from jaxscale.ops.attention.context import NEVER, AttentionContext
from jaxscale.ops.attention.kernels import Kernel
from jaxscale.ops.device import kernel_family
from jaxscale.ops.precision import accumulator
from jaxscale.ops.tiles import over_tiles
from jaxscale.types import Array

KEY_BLOCK = 64  # also the size of a page of the cache
QUERY_TILE = 16


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "positions", "segments"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class KeyBlocks:
    """Keys in blocks.

    Args:
        k, v: [blocks, KEY_BLOCK, K, H].
        positions: [blocks, KEY_BLOCK] int32, negative where there is no key.
        segments: [blocks, KEY_BLOCK] int32.
    """

    k: Array
    v: Array
    positions: Array
    segments: Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
) -> Array:
    """As `ops.attention.attention`; a document has the same bits in every row that it begins in.

    A document that begins within a row has them if it begins at a multiple of KEY_BLOCK.
    """
    if context.is_aligned and has_kernels(q.shape[2], k.shape[2], q.shape[3], q.dtype):
        return Kernel("mosaic", is_invariant=True).attend(q, k, v, context)
    batch, length = k.shape[:2]
    keyed = context.positions if context.is_aligned else context.key_positions
    segments = context.segments if context.is_aligned else context.key_segments
    if segments is None:
        segments = jnp.zeros_like(keyed)
    padding = -length % KEY_BLOCK

    def blocks(x: Array, fill: int = 0) -> Array:
        margins = [(0, 0), (0, padding), *((0, 0) for _ in x.shape[2:])]
        x = jnp.pad(x, margins, constant_values=fill)
        return x.reshape(batch, -1, KEY_BLOCK, *x.shape[2:])

    keys = KeyBlocks(blocks(k), blocks(v), blocks(keyed, -1), blocks(segments))
    own = context.segments
    if own is None:
        own = jnp.zeros_like(context.positions)

    def of_row(row: tuple) -> Array:
        q, positions, segments, keys = row
        return over_blocks(q, positions, segments, keys, context)

    return lax.map(of_row, (q, context.positions, own, keys))


def has_kernels(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
) -> bool:
    """Whether our kernels compute these heads here, in training and over pages."""
    q = jax.ShapeDtypeStruct((1, num_heads, head_dim), dtype)
    keys = jax.ShapeDtypeStruct((1, KEY_BLOCK, num_kv_heads, head_dim), dtype)
    refusals = paged_refusal("mosaic", q, keys), attention_refusal("mosaic", keys, keys)
    return kernel_family() == "mosaic" and refusals == (None, None)


def refusal(q: Array, context: AttentionContext) -> str | None:
    """What of the request this backend cannot do, as the text of an error; None when it can."""
    return "a backend for a layout of blocks" if context.layout is not None else None


def over_blocks(
    q: Array,
    positions: Array,
    segments: Array,
    keys: KeyBlocks,
    context: AttentionContext,
) -> Array:
    """Attention of queries over the blocks of keys of their segments.

    Args:
        q: [T, N, H].
        positions: [T] int32.
        segments: [T] int32; a query sees the keys of its own.
        keys: those of a segment in the order of their positions.
        context: window, soft-cap, scale and whether it is causal.
    Returns:
        [T, N, H] in the type of `q`; 0 where a query sees nothing.
    """

    def of_tile(tile: tuple[Array, Array, Array]) -> Array:
        q, positions, segments = (x[0] for x in tile)
        own = dataclasses.replace(
            context, positions=positions[None], segments=segments[None], lengths=None
        )
        return _over_blocks(q, keys, own)[None]

    # What fills a tile up has position 0 and sees what it may; nobody reads its result.
    return over_tiles(of_tile, (q[None], positions[None], segments[None]), QUERY_TILE)[0]


def _over_blocks(
    q: Array,
    keys: KeyBlocks,
    context: AttentionContext,
) -> Array:
    """A tile of queries [QUERY_TILE, N, H], one block of keys after the other."""
    num, num_heads, head_dim = q.shape
    num_kv_heads = keys.k.shape[2]
    q_KGTH = jnp.moveaxis(q.reshape(num, num_kv_heads, -1, head_dim), 0, 2)
    q_KGTH = accumulator(q_KGTH)
    rows = q_KGTH.shape[:3]
    start = (
        jnp.full((*rows, 1), NEVER, q_KGTH.dtype),
        jnp.zeros((*rows, 1), q_KGTH.dtype),
        jnp.zeros(q_KGTH.shape, q_KGTH.dtype),
    )

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(sums: tuple, block: KeyBlocks) -> tuple:
        # In their own type up to here, so that no rounding is left out.
        sums, k, v = lax.optimization_barrier((sums, block.k, block.v))
        return lax.optimization_barrier(_added(sums, q_KGTH, k, v, visible_of(block), context))

    def visible_of(block: KeyBlocks) -> Array:
        keyed = dataclasses.replace(
            context, key_positions=block.positions[None], key_segments=block.segments[None]
        )
        return keyed.mask()[0]

    def step(sums: tuple, block: KeyBlocks) -> tuple[tuple, None]:
        is_seen = visible_of(block).any()
        return lax.cond(is_seen, add, lambda sums, _: sums, sums, block), None

    (_, total, weighted), _ = lax.scan(step, start, keys)
    o = weighted / jnp.where(total > 0, total, 1)
    return jnp.moveaxis(o, 2, 0).reshape(num, num_heads, head_dim).astype(q.dtype)


def _added(
    sums: tuple[Array, Array, Array],
    q: Array,
    k: Array,
    v: Array,
    visible: Array,
    context: AttentionContext,
) -> tuple[Array, Array, Array]:
    """The sums (largest logit, denominator, numerator) with a block of keys.

    Args:
        sums: [K, G, T, 1], [K, G, T, 1] and [K, G, T, H].
        q: [K, G, T, H].
        k, v: [KEY_BLOCK, K, H].
        visible: [1, T, KEY_BLOCK].
        context: soft-cap and scale.
    """
    top, total, weighted = sums
    logits = jnp.einsum("kgth,skh->kgts", q, accumulator(k))
    logits = logits * context.logits_scale(q.shape[-1])
    if context.softcap is not None:
        logits = context.softcap * jnp.tanh(logits / context.softcap)
    visible = visible[:, None]
    logits = jnp.where(visible, logits, NEVER)
    new_top = jnp.maximum(top, lax.stop_gradient(logits.max(-1, keepdims=True)))
    weights = jnp.where(visible, jnp.exp(logits - new_top), 0)
    scale = jnp.exp(top - new_top)
    # Weights are rounded to the type of the values, as a kernel's would be.
    product = jnp.einsum("kgts,skh->kgth", accumulator(weights.astype(v.dtype)), accumulator(v))
    total = total * scale + weights.sum(-1, keepdims=True)
    return new_top, total, weighted * scale + product
