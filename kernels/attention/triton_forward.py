"""The forward of attention for any NVIDIA GPU since Ampere, as a Triton kernel.

A program takes a tile of queries and goes over the tiles of keys that they see.

Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout
from jaxscale.kernels.attention.triton_programs import (
    grid_of,
    head_number,
    head_offset,
    key_work,
    place_of,
    row_offsets,
    runs,
    seen,
    sizes_of,
    visit,
)
from jaxscale.kernels.triton_call import blocks_of, call
from jaxscale.kernels.triton_softmax import LOG2E, capped, softmax_step


@triton.jit
def _attend(
    o,
    total,
    top,
    q,
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
    """Goes over tiles of keys; `top` and the exponents are in powers of two."""
    # Of a block of keys all tiles are visited, though its last ones may lie past the end.
    unit: tl.constexpr = COLUMNS * PARTS if PARTS else COLUMNS
    for number in range(begin, end):
        tile, flags = visit(entries, number, skip_from, skip, IS_MASKED, PARTS)
        first = tile * COLUMNS
        key = first + tl.arange(0, COLUMNS)
        offset = first.to(tl.int64) * STRIDE
        if IS_MASKED and NUM_KEYS % unit:
            k = tl.load(k_tile + offset, mask=(key < NUM_KEYS)[None, :], other=0.0)
        else:
            k = tl.load(k_tile + offset)
        logits, factor = capped(tl.dot(q, k), SCALE, SOFTCAP)
        if IS_MASKED:
            sees = seen(key[None, :], low[:, None], high[:, None], flags, query, ROWS, PARTS, BLOCK)
            logits = tl.where(sees, logits, -float("inf"))
        p, shrink, total, top = softmax_step(logits, factor, total, top, IS_MASKED)
        o = o * shrink[:, None]
        if IS_MASKED and NUM_KEYS % unit:
            v = tl.load(v_tile + offset, mask=(key < NUM_KEYS)[:, None], other=0.0)
        else:
            v = tl.load(v_tile + offset)
        o = tl.dot(p.to(v.dtype), v, o)
    return o, total, top


@triton.jit
def _forward(
    table,
    entries,
    low,
    high,
    q,
    k,
    v,
    o,
    lse,
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
    """Attention of one tile of queries of one head."""
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
    of_queries = head_offset(batch, head, NUM_QUERIES, NUM_HEADS, HEAD_DIM)
    of_queries += row_offsets(query, NUM_HEADS, HEAD_DIM)
    is_query = query < NUM_QUERIES
    q_tile = tl.load(q + of_queries, mask=is_query[:, None], other=0.0)
    stride: tl.constexpr = KV_HEADS * HEAD_DIM
    of_keys = head_offset(batch, head // (NUM_HEADS // KV_HEADS), NUM_KEYS, KV_HEADS, HEAD_DIM)
    key, h = tl.arange(0, COLUMNS), tl.arange(0, HEAD_DIM)
    k_tile = k + of_keys + key[None, :] * stride + h[:, None]
    v_tile = v + of_keys + key[:, None] * stride + h[None, :]
    whole_first, whole_end, first, end = runs(table + place * 4, PARTS)
    entries += place * NUM_VISITS
    o_tile = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    o_tile, total, top = _attend(
        o_tile, total, top, q_tile, k_tile, v_tile, entries, query, low_query, high_query,
        whole_first, whole_end, 0, 0, False,
        stride, NUM_KEYS, ROWS, COLUMNS, SCALE, SOFTCAP, PARTS, BLOCK,
    )  # fmt: skip
    o_tile, total, top = _attend(
        o_tile, total, top, q_tile, k_tile, v_tile, entries, query, low_query, high_query,
        first, end, whole_first, whole_end - whole_first, True,
        stride, NUM_KEYS, ROWS, COLUMNS, SCALE, SOFTCAP, PARTS, BLOCK,
    )  # fmt: skip
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    o_tile = o_tile / total[:, None]
    tl.store(o + of_queries, o_tile.to(o.dtype.element_ty), mask=is_query[:, None])
    lse_tile = tl.where(sees, (top + tl.log2(total)) / LOG2E, -float("inf"))
    tl.store(lse + number * NUM_TILES * ROWS + query, lse_tile)


def forward(
    q: Array,
    k: Array,
    v: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Attention of every query t over the keys low[t] <= s < high[t].

    Args:
        q: [B, T, N, H], H one of 64, 128 and 256.
        k, v: [B, S, K, H].
        low, high: [B or 1, T] int32; with a layout they must be those of a causal mask.
        scale, softcap, layout, interpret: as for `api.attention`.
    Returns:
        (o [B, T, N, H], lse [B, N, T] float32); 0 and -inf where a query sees nothing.
    """
    batch, length, num_heads, head_dim = q.shape
    # Tiles of a layout are of one or two blocks of queries and of a part of one of keys.
    blocks = blocks_of(f"attention.{'layout' if layout else 'forward'}.{head_dim}")
    rows, columns = blocks.rows, blocks.columns
    num_tiles = triton.cdiv(length, rows)
    padded = num_tiles * rows
    low, high = (jnp.pad(x, ((0, 0), (0, padded - length))) for x in (low, high))
    tiles = dict(rows=rows, columns=columns, num_keys=k.shape[1])
    table, entries = key_work(low, high, layout, **tiles)
    o_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
    lse_type = jax.ShapeDtypeStruct((batch, num_heads, padded), jnp.float32)
    o, lse = call(
        _forward,
        *(table, entries, low, high, q, k, v),
        out_type=(o_type, lse_type),
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
    return o, lse[:, :, :length]
