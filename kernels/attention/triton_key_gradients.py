"""The gradients of keys and values for any NVIDIA GPU since Ampere, as a Triton kernel.

A program takes a tile of keys and goes over the tiles of queries that see them.

Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), algorithm 2.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout, query_tiles, query_visits
from jaxscale.kernels.attention.triton_programs import (
    grid_of,
    head_number,
    head_offset,
    pad_queries,
    place_of,
    row_offsets,
    runs,
    seen,
    sizes_of,
    visit,
)
from jaxscale.kernels.triton_call import blocks_of, call
from jaxscale.kernels.triton_softmax import capped


@triton.jit
def _add_gradients(
    dk,
    dv,
    k,
    v,
    entries,
    q,
    do,
    low,
    high,
    lse,
    delta,
    key,
    begin,
    end,
    skip_from,
    skip,
    IS_MASKED: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Goes over tiles of queries of one head; logits and their gradients are [keys, queries]."""
    h = tl.arange(0, HEAD_DIM)
    # Of a block of queries all tiles are visited, though its last ones may lie past the end.
    unit: tl.constexpr = QUERIES * PARTS if PARTS else QUERIES
    for number in range(begin, end):
        tile, flags = visit(entries, number, skip_from, skip, IS_MASKED, PARTS)
        query = tile * QUERIES + tl.arange(0, QUERIES)
        at = query.to(tl.int64)[:, None] * STRIDE + h[None, :]
        is_query = (query < NUM_QUERIES)[:, None]
        if NUM_QUERIES % unit:
            q_tile = tl.load(q + at, mask=is_query, other=0.0)
            do_tile = tl.load(do + at, mask=is_query, other=0.0)
        else:
            q_tile = tl.load(q + at)
            do_tile = tl.load(do + at)
        logits, factor = capped(tl.dot(k, tl.trans(q_tile)), SCALE, SOFTCAP)
        p = tl.exp2(logits * factor - tl.load(lse + query)[None, :])
        if IS_MASKED:
            low_query = tl.load(low + query)[None, :]
            high_query = tl.load(high + query)[None, :]
            sees = seen(key[:, None], low_query, high_query, flags, key, KEYS, PARTS, BLOCK)
            p = tl.where(sees, p, 0.0)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv)
        dp = tl.dot(v, tl.trans(do_tile))
        ds = p * (dp - tl.load(delta + query)[None, :])
        if SOFTCAP > 0:
            ds = ds * (1 - logits * logits)
        ds = ds.to(q_tile.dtype)
        dk = tl.dot(ds, q_tile, dk)
    return dk, dv


@triton.jit
def _key_gradients(
    table,
    entries,
    low,
    high,
    lse,
    delta,
    q,
    k,
    v,
    do,
    dk,
    dv,
    BATCH: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    NUM_BOUNDS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_VISITS: tl.constexpr,
    NUM_PATTERNS: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of one tile of keys and values of one kv head."""
    # Under a causal mask the first tiles are seen by most queries, so they come first.
    tile = tl.program_id(1)
    number = head_number()
    if number >= BATCH * KV_HEADS:
        return
    kv_head = number % KV_HEADS
    batch = number // KV_HEADS
    groups: tl.constexpr = NUM_HEADS // KV_HEADS
    stride: tl.constexpr = NUM_HEADS * HEAD_DIM
    bounds_row = batch % NUM_BOUNDS
    low += bounds_row * PADDED
    high += bounds_row * PADDED
    key = tile * KEYS + tl.arange(0, KEYS)
    of_keys = head_offset(batch, kv_head, NUM_KEYS, KV_HEADS, HEAD_DIM)
    of_keys += row_offsets(key, KV_HEADS, HEAD_DIM)
    is_key = (key < NUM_KEYS)[:, None]
    k_tile = tl.load(k + of_keys, mask=is_key, other=0.0)
    v_tile = tl.load(v + of_keys, mask=is_key, other=0.0)
    dk_tile = tl.zeros((KEYS, HEAD_DIM), tl.float32)
    dv_tile = tl.zeros((KEYS, HEAD_DIM), tl.float32)
    for group in range(groups):
        head = kv_head * groups + group
        place = place_of(head, bounds_row, tile, NUM_PATTERNS, NUM_TILES)
        whole_first, whole_end, first, end = runs(table + place * 4, PARTS)
        of_queries = head_offset(batch, head, NUM_QUERIES, NUM_HEADS, HEAD_DIM)
        of_sums = (batch * NUM_HEADS + head) * PADDED
        dk_tile, dv_tile = _add_gradients(
            dk_tile, dv_tile, k_tile, v_tile, entries + place * NUM_VISITS,
            q + of_queries, do + of_queries,
            low, high, lse + of_sums, delta + of_sums, key,
            whole_first, whole_end, 0, 0, False,
            stride, HEAD_DIM, NUM_QUERIES, KEYS, QUERIES, SCALE, SOFTCAP, PARTS, BLOCK,
        )  # fmt: skip
        dk_tile, dv_tile = _add_gradients(
            dk_tile, dv_tile, k_tile, v_tile, entries + place * NUM_VISITS,
            q + of_queries, do + of_queries,
            low, high, lse + of_sums, delta + of_sums, key,
            first, end, whole_first, whole_end - whole_first, True,
            stride, HEAD_DIM, NUM_QUERIES, KEYS, QUERIES, SCALE, SOFTCAP, PARTS, BLOCK,
        )  # fmt: skip
    tl.store(dk + of_keys, (dk_tile * SCALE).to(dk.dtype.element_ty), mask=is_key)
    tl.store(dv + of_keys, dv_tile.to(dv.dtype.element_ty), mask=is_key)


def key_gradients(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None,
    interpret: Any,
) -> tuple[Array, Array]:
    """Gradients of k and v; arguments as those of `triton_backward.backward`.

    lse is in powers of two, and +inf where a query sees nothing, so that probabilities are 0 there,
    not NaN.
    """
    batch, length, _, head_dim = q.shape
    num_keys, kv_heads = k.shape[1:3]
    # Tiles of a layout are of one or two blocks of keys and of a part of one of queries.
    blocks = blocks_of(f"attention.{'layout_' if layout else ''}key_gradients.{head_dim}")
    keys, queries = blocks.rows, blocks.columns
    padded = length + -length % (BLOCK if layout else queries)
    num_tiles = triton.cdiv(num_keys, keys)
    low, high, lse, delta = pad_queries(padded, low, high, lse, delta)
    if layout:
        size = keys // BLOCK
        visited = query_visits(layout, padded // BLOCK, num_tiles * size, size)
        table, entries = map(jnp.asarray, visited)
    else:
        table = query_tiles(low, high, queries=queries, keys=keys, num_keys=num_keys)
        entries = jnp.zeros((1, 1, 1), jnp.int32)
    like_k = jax.ShapeDtypeStruct(k.shape, k.dtype)
    return call(
        _key_gradients,
        *(table, entries, low, high, lse, delta, q, k, v, do),
        out_type=(like_k, like_k),
        grid=grid_of(num_tiles, batch * kv_heads),
        blocks=blocks,
        interpret=interpret,
        **sizes_of(q, k, low, layout),
        PADDED=padded,
        NUM_TILES=num_tiles,
        NUM_VISITS=entries.shape[-1],
        PARTS=BLOCK // queries if layout else 0,
        SCALE=scale,
        SOFTCAP=softcap or 0.0,
        KEYS=keys,
        QUERIES=queries,
    )
