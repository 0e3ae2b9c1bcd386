"""The gradient of queries for any NVIDIA GPU since Ampere, as a Triton kernel.

A program takes a tile of queries and goes over the tiles of keys that they see. It computes the
logits a second time, which spares the programs of keys to add it up in memory: two of seven
products more, and the same bits from run to run.

Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), algorithm 2.
"""

from typing import Any

import jax
import triton
import triton.language as tl
from jax import Array

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout
from jaxscale.kernels.attention.triton_programs import (
    grid_of,
    head_number,
    head_offset,
    key_work,
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
def _add_gradient(
    dq,
    q,
    do,
    lse_query,
    delta_query,
    k_tile,
    v_tile,
    entries,
    query,
    low,
    high,
    begin,
    end,
    skip_from,
    skip,
    IS_MASKED: tl.constexpr,
    STRIDE: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Goes over tiles of keys."""
    # Of a block of keys all tiles are visited, though its last ones may lie past the end.
    unit: tl.constexpr = COLUMNS * PARTS if PARTS else COLUMNS
    for number in range(begin, end):
        tile, flags = visit(entries, number, skip_from, skip, IS_MASKED, PARTS)
        first = tile * COLUMNS
        key = first + tl.arange(0, COLUMNS)
        offset = first.to(tl.int64) * STRIDE
        if IS_MASKED and NUM_KEYS % unit:
            is_key = (key < NUM_KEYS)[None, :]
            k = tl.load(k_tile + offset, mask=is_key, other=0.0)
            v = tl.load(v_tile + offset, mask=is_key, other=0.0)
        else:
            k = tl.load(k_tile + offset)
            v = tl.load(v_tile + offset)
        logits, factor = capped(tl.dot(q, k), SCALE, SOFTCAP)
        p = tl.exp2(logits * factor - lse_query[:, None])
        if IS_MASKED:
            sees = seen(key[None, :], low[:, None], high[:, None], flags, query, ROWS, PARTS, BLOCK)
            p = tl.where(sees, p, 0.0)
        ds = p * (tl.dot(do, v) - delta_query[:, None])
        if SOFTCAP > 0:
            ds = ds * (1 - logits * logits)
        dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq)
    return dq


@triton.jit
def _query_gradient(
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
    dq,
    BATCH: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of one tile of queries of one head."""
    # Under a causal mask the last tiles see most keys, so they come first.
    tile = NUM_TILES - 1 - tl.program_id(1)
    number = head_number()
    if number >= BATCH * NUM_HEADS:
        return
    head = number % NUM_HEADS
    batch = number // NUM_HEADS
    bounds_row = batch % NUM_BOUNDS
    place = place_of(head, bounds_row, tile, NUM_PATTERNS, NUM_TILES)
    query = tile * ROWS + tl.arange(0, ROWS)
    query_bounds = bounds_row * NUM_TILES * ROWS + query
    low_query = tl.load(low + query_bounds)
    high_query = tl.load(high + query_bounds)
    of_sums = number * NUM_TILES * ROWS + query
    lse_query = tl.load(lse + of_sums)
    delta_query = tl.load(delta + of_sums)
    of_queries = head_offset(batch, head, NUM_QUERIES, NUM_HEADS, HEAD_DIM)
    of_queries += row_offsets(query, NUM_HEADS, HEAD_DIM)
    is_query = query < NUM_QUERIES
    q_tile = tl.load(q + of_queries, mask=is_query[:, None], other=0.0)
    do_tile = tl.load(do + of_queries, mask=is_query[:, None], other=0.0)
    stride: tl.constexpr = KV_HEADS * HEAD_DIM
    of_keys = head_offset(batch, head // (NUM_HEADS // KV_HEADS), NUM_KEYS, KV_HEADS, HEAD_DIM)
    key, h = tl.arange(0, COLUMNS), tl.arange(0, HEAD_DIM)
    at = key[None, :] * stride + h[:, None]
    k_tile = k + of_keys + at
    v_tile = v + of_keys + at
    whole_first, whole_end, first, end = runs(table + place * 4, PARTS)
    entries += place * NUM_VISITS
    dq_tile = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    dq_tile = _add_gradient(
        dq_tile, q_tile, do_tile, lse_query, delta_query, k_tile, v_tile, entries, query,
        low_query, high_query, whole_first, whole_end, 0, 0, False,
        stride, NUM_KEYS, ROWS, COLUMNS, SCALE, SOFTCAP, PARTS, BLOCK,
    )  # fmt: skip
    dq_tile = _add_gradient(
        dq_tile, q_tile, do_tile, lse_query, delta_query, k_tile, v_tile, entries, query,
        low_query, high_query, first, end, whole_first, whole_end - whole_first, True,
        stride, NUM_KEYS, ROWS, COLUMNS, SCALE, SOFTCAP, PARTS, BLOCK,
    )  # fmt: skip
    tl.store(dq + of_queries, (dq_tile * SCALE).to(dq.dtype.element_ty), mask=is_query[:, None])


def query_gradient(
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
    dtype: Any,
    interpret: Any,
) -> Array:
    """Gradient of q, in `dtype`; other arguments as those of `key_gradients`."""
    batch, length, num_heads, head_dim = q.shape
    # Tiles of a layout are of one or two blocks of queries and of a part of one of keys.
    blocks = blocks_of(f"attention.{'layout_' if layout else ''}query_gradient.{head_dim}")
    rows, columns = blocks.rows, blocks.columns
    num_tiles = triton.cdiv(length, rows)
    low, high, lse, delta = pad_queries(num_tiles * rows, low, high, lse, delta)
    tiles = dict(rows=rows, columns=columns, num_keys=k.shape[1])
    table, entries = key_work(low, high, layout, **tiles)
    (dq,) = call(
        _query_gradient,
        *(table, entries, low, high, lse, delta, q, k, v, do),
        out_type=(jax.ShapeDtypeStruct(q.shape, dtype),),
        grid=grid_of(num_tiles, batch * num_heads),
        blocks=blocks,
        interpret=interpret,
        **sizes_of(q, k, low, layout),
        NUM_TILES=num_tiles,
        NUM_VISITS=entries.shape[-1],
        PARTS=BLOCK // columns if layout else 0,
        SCALE=scale,
        SOFTCAP=softcap or 0.0,
        ROWS=rows,
        COLUMNS=columns,
    )
    return dq
