"""Attention over pages for any NVIDIA GPU since Ampere, as a Triton kernel.

A program reads a stream of tiles of keys of one sequence and kv head; a tile is a page or a part
of one. Where there are fewer sequences and heads than the GPU has room for, the tiles of each are
dealt out to several streams, whose results are added up by their normalisers.

Source: Dao 2023 (arXiv 2307.08691), algorithm 1; Dao et al. 2023, Flash-Decoding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout
from jaxscale.kernels.triton_call import blocks_of, call
from jaxscale.kernels.triton_softmax import LEAST_ROWS, LOG2E, capped, softmax_step

PROGRAMS = 264  # that run at a time: two on each multiprocessor of a large GPU


@triton.jit
def _over_pages(
    block_table,
    low,
    high,
    q,
    k_pages,
    v_pages,
    mask,
    o,
    lse,
    TABLE_WIDTH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOCAL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One stream of one sequence and kv head."""
    sequence, head, stream = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_streams = tl.num_programs(2)
    low_key = tl.load(low + sequence)
    high_key = tl.load(high + sequence)
    row, h, key = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM), tl.arange(0, COLUMNS)
    is_row = (row < GROUPS)[:, None]
    first_row = (sequence.to(tl.int64) * KV_HEADS + head) * GROUPS
    of_queries = (first_row + row[:, None]) * HEAD_DIM + h[None, :]
    q_tile = tl.load(q + of_queries, mask=is_row, other=0.0)
    stride: tl.constexpr = KV_HEADS * HEAD_DIM
    k_page = k_pages + head * HEAD_DIM + key[None, :] * stride + h[:, None]
    v_page = v_pages + head * HEAD_DIM + key[:, None] * stride + h[None, :]
    o_tile = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    end = tl.where(high_key > low_key, tl.cdiv(high_key, COLUMNS), 0)
    start = low_key // COLUMNS
    if STRIDE:
        # As in `seen_pages`: the columns that one of the queries sees, and then the local blocks.
        parts: tl.constexpr = BLOCK_SIZE // COLUMNS
        width: tl.constexpr = GROUPS if GROUPS < STRIDE else STRIDE
        shift = (head + 1) * GROUPS % STRIDE
        least = low_key // BLOCK_SIZE + shift
        before = least // STRIDE * width + tl.minimum(least % STRIDE, width)
        block = (high_key - 1) // BLOCK_SIZE
        local = tl.maximum(block - (LOCAL - 1), low_key // BLOCK_SIZE)
        most = local + shift
        columns = most // STRIDE * width + tl.minimum(most % STRIDE, width) - before
        start = 0
        end = tl.where(high_key > low_key, end - local * parts + columns * parts, 0)
    for place in range(start + stream, end, num_streams):
        number = place
        if STRIDE:
            rank = before + place // parts
            column = (rank // width * STRIDE + rank % width - shift) * parts + place % parts
            number = tl.where(place < columns * parts, column, place + (local - columns) * parts)
        first = number * COLUMNS
        page = tl.load(block_table + sequence * TABLE_WIDTH + first // PAGE_SIZE).to(tl.int64)
        slot = (page * PAGE_SIZE + first % PAGE_SIZE) * stride
        logits = tl.dot(q_tile, tl.load(k_page + slot))
        logits, factor = capped(logits, SCALE, SOFTCAP)
        slot_key = first + key
        sees = (slot_key >= low_key) & (slot_key < high_key)
        if SHARE:
            row_of_mask = mask + (sequence // SHARE).to(tl.int64) * TABLE_WIDTH * PAGE_SIZE
            sees = sees & (tl.load(row_of_mask + slot_key) != 0)
        sees = sees[None, :]
        if STRIDE:
            of_block = first // BLOCK_SIZE
            turn = (of_block + head * GROUPS + row + 1) % STRIDE
            sees = sees & ((turn == 0) | (of_block > block - LOCAL))[:, None]
        logits = tl.where(sees, logits, -float("inf"))
        p, shrink, total, top = softmax_step(logits, factor, total, top, True)
        v_tile = tl.load(v_page + slot)
        o_tile = tl.dot(p.to(v_tile.dtype), v_tile, o_tile * shrink[:, None])
    sees_any = total > 0
    total = tl.where(sees_any, total, 1.0)
    lse_tile = tl.where(sees_any, (top + tl.log2(total)) / LOG2E, -float("inf"))
    row_out = ((sequence.to(tl.int64) * KV_HEADS + head) * num_streams + stream) * GROUPS + row
    at = row_out[:, None] * HEAD_DIM + h[None, :]
    tl.store(o + at, (o_tile / total[:, None]).to(o.dtype.element_ty), mask=is_row)
    tl.store(lse + row_out, lse_tile, mask=row < GROUPS)


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    low: Array,
    high: Array,
    mask: Array | None = None,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
    interpret: Any = False,
) -> Array:
    """As `api.paged_attention`."""
    num, num_heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    groups, width = num_heads // kv_heads, block_table.shape[1]
    blocks = blocks_of("paged_attention")
    # A tile is of one block of a layout.
    columns = min(blocks.columns, page_size, *([BLOCK] if layout else []))
    num_tiles = width * page_size // columns
    num_streams = max(min(PROGRAMS // (num * kv_heads), num_tiles), 1)
    shape = num, kv_heads, num_streams, groups
    # Without a mask the kernel reads none, and any array stands in its place.
    of_mask = low if mask is None else mask.astype(jnp.int8)
    o, lse = call(
        _over_pages,
        *(block_table, low, high, q, k_pages, v_pages, of_mask),
        out_type=(
            jax.ShapeDtypeStruct((*shape, head_dim), q.dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        grid=(num, kv_heads, num_streams),
        blocks=blocks,
        interpret=interpret,
        TABLE_WIDTH=width,
        KV_HEADS=kv_heads,
        GROUPS=groups,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        SCALE=scale,
        SOFTCAP=softcap or 0.0,
        LOCAL=layout.local if layout else 0,
        STRIDE=layout.stride if layout else 0,
        BLOCK_SIZE=BLOCK,
        SHARE=0 if mask is None else num // len(mask),
        ROWS=max(triton.next_power_of_2(groups), LEAST_ROWS),
        COLUMNS=columns,
    )
    # A stream that sees nothing has an lse of -inf and an output of 0.
    weights = jax.nn.softmax(jnp.maximum(lse, jnp.finfo(lse.dtype).min), axis=2)
    joined = (o * weights[..., None]).sum(2) if num_streams > 1 else o
    return joined.reshape(q.shape).astype(q.dtype)
