"""Attention for any NVIDIA GPU since Ampere, as Triton kernels.

The forward takes a tile of queries a program and goes over the tiles of keys that they see. The
backward takes a tile of keys, keeps the sums of their gradients, and adds up the gradient of the
queries in memory, in the order in which programs come to it.

Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from jaxscale.kernels.attention.tiles import (
    BLOCK,
    BlockLayout,
    key_tiles,
    key_visits,
    query_tiles,
    query_visits,
)
from jaxscale.kernels.triton_call import blocks_of, call
from jaxscale.kernels.triton_softmax import capped, softmax_step

# Heads whose programs are started in turn, longest first. Of a head alone the last and longest ones
# would run when most of the GPU is idle; of all at once too much would be in work for the L2 cache.
TOGETHER = 4
LOG2E = math.log2(math.e)


@triton.jit
def _visit(entries, position, NUM_PATTERNS: tl.constexpr):
    """(tile, flags) of a place in the list; without a layout a tile's place is its number."""
    if NUM_PATTERNS:
        entry = tl.load(entries + position)
        return entry >> 2, entry & 3
    return position, 0


@triton.jit
def _runs(table):
    """(first of the tiles of which all see all, their end, first and end of the others).

    The others are numbered as if those in between were missing.
    """
    first = tl.load(table)
    end = tl.load(table + 1)
    whole_first = tl.load(table + 2)
    whole_end = tl.load(table + 3)
    return whole_first, whole_end, first, end - (whole_end - whole_first)


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
    NUM_PATTERNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Goes over tiles of keys; `top` and the exponents are in powers of two."""
    for number in range(begin, end):
        position = number
        if IS_MASKED:
            position = tl.where(number < skip_from, number, number + skip)
        tile, flags = _visit(entries, position, NUM_PATTERNS)
        first = tile * COLUMNS
        key = first + tl.arange(0, COLUMNS)
        offset = first.to(tl.int64) * STRIDE
        if IS_MASKED and NUM_KEYS % COLUMNS:
            k = tl.load(k_tile + offset, mask=(key < NUM_KEYS)[None, :], other=0.0)
        else:
            k = tl.load(k_tile + offset)
        logits, factor = capped(tl.dot(q, k), SCALE, SOFTCAP)
        if IS_MASKED:
            sees = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            if NUM_PATTERNS:
                bit = query % ROWS // BLOCK
                sees = sees & ((flags >> bit) & 1 > 0)[:, None]
            logits = tl.where(sees, logits, -float("inf"))
        p, shrink, total, top = softmax_step(logits, factor, total, top, IS_MASKED)
        o = o * shrink[:, None]
        if IS_MASKED and NUM_KEYS % COLUMNS:
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
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attention of one tile of queries of one head."""
    # Under a causal mask the last tiles see most keys, so they come first.
    tile = NUM_TILES - 1 - tl.program_id(1)
    number = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    if number >= BATCH * NUM_HEADS:
        return
    head = number % NUM_HEADS
    batch = number // NUM_HEADS
    bounds_row = batch % NUM_BOUNDS
    place = (head % NUM_PATTERNS if NUM_PATTERNS else bounds_row) * NUM_TILES + tile
    query = tile * ROWS + tl.arange(0, ROWS)
    query_bounds = bounds_row * NUM_TILES * ROWS + query
    low_query = tl.load(low + query_bounds)
    high_query = tl.load(high + query_bounds)
    h = tl.arange(0, HEAD_DIM)
    row_stride: tl.constexpr = NUM_HEADS * HEAD_DIM
    stride: tl.constexpr = KV_HEADS * HEAD_DIM
    of_queries = batch.to(tl.int64) * NUM_QUERIES * row_stride + head * HEAD_DIM
    of_queries += query[:, None].to(tl.int64) * row_stride + h[None, :]
    is_query = query < NUM_QUERIES
    q_tile = tl.load(q + of_queries, mask=is_query[:, None], other=0.0)
    kv_head = head // (NUM_HEADS // KV_HEADS)
    of_keys = batch.to(tl.int64) * NUM_KEYS * stride + kv_head * HEAD_DIM
    key = tl.arange(0, COLUMNS)
    k_tile = k + of_keys + key[None, :] * stride + h[:, None]
    v_tile = v + of_keys + key[:, None] * stride + h[None, :]
    whole_first, whole_end, first, end = _runs(table + place * 4)
    entries += place * NUM_VISITS
    o_tile = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    o_tile, total, top = _attend(
        o_tile, total, top, q_tile, k_tile, v_tile, entries, query, low_query, high_query,
        whole_first, whole_end, 0, 0, False,
        stride, NUM_KEYS, ROWS, COLUMNS, SCALE, SOFTCAP, NUM_PATTERNS, BLOCK,
    )  # fmt: skip
    o_tile, total, top = _attend(
        o_tile, total, top, q_tile, k_tile, v_tile, entries, query, low_query, high_query,
        first, end, whole_first, whole_end - whole_first, True,
        stride, NUM_KEYS, ROWS, COLUMNS, SCALE, SOFTCAP, NUM_PATTERNS, BLOCK,
    )  # fmt: skip
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    o_tile = o_tile / total[:, None]
    tl.store(o + of_queries, o_tile.to(o.dtype.element_ty), mask=is_query[:, None])
    lse_tile = tl.where(sees, (top + tl.log2(total)) / 1.4426950408889634, -float("inf"))
    tl.store(lse + number * NUM_TILES * ROWS + query, lse_tile)


@triton.jit
def _add_gradients(
    dk,
    dv,
    k,
    v,
    entries,
    q,
    do,
    dq,
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
    NUM_PATTERNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Goes over tiles of queries of one head; logits and their gradients are [keys, queries]."""
    h = tl.arange(0, HEAD_DIM)
    for number in range(begin, end):
        position = number
        if IS_MASKED:
            position = tl.where(number < skip_from, number, number + skip)
        tile, flags = _visit(entries, position, NUM_PATTERNS)
        query = tile * QUERIES + tl.arange(0, QUERIES)
        at = query.to(tl.int64)[:, None] * STRIDE + h[None, :]
        is_query = (query < NUM_QUERIES)[:, None]
        if NUM_QUERIES % QUERIES:
            q_tile = tl.load(q + at, mask=is_query, other=0.0)
            do_tile = tl.load(do + at, mask=is_query, other=0.0)
        else:
            q_tile = tl.load(q + at)
            do_tile = tl.load(do + at)
        logits, factor = capped(tl.dot(k, tl.trans(q_tile)), SCALE, SOFTCAP)
        p = tl.exp2(logits * factor - tl.load(lse + query)[None, :])
        if IS_MASKED:
            low_query = tl.load(low + query)
            high_query = tl.load(high + query)
            sees = (key[:, None] >= low_query[None, :]) & (key[:, None] < high_query[None, :])
            if NUM_PATTERNS:
                bit = key % KEYS // BLOCK
                sees = sees & ((flags >> bit) & 1 > 0)[:, None]
            p = tl.where(sees, p, 0.0)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv)
        dp = tl.dot(v, tl.trans(do_tile))
        ds = p * (dp - tl.load(delta + query)[None, :])
        if SOFTCAP > 0:
            ds = ds * (1 - logits * logits)
        ds = ds.to(q_tile.dtype)
        dk = tl.dot(ds, q_tile, dk)
        dq_tile = tl.dot(tl.trans(ds), k)
        tl.atomic_add(dq + at, dq_tile, mask=is_query, sem="relaxed")
    return dk, dv


@triton.jit
def _backward(
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
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of one tile of keys and values of one kv head, and its part of the queries'."""
    # Under a causal mask the first tiles are seen by most queries, so they come first.
    tile = tl.program_id(1)
    number = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
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
    h = tl.arange(0, HEAD_DIM)
    of_keys = (batch.to(tl.int64) * NUM_KEYS * KV_HEADS + kv_head) * HEAD_DIM
    of_keys += key[:, None].to(tl.int64) * (KV_HEADS * HEAD_DIM) + h[None, :]
    is_key = (key < NUM_KEYS)[:, None]
    k_tile = tl.load(k + of_keys, mask=is_key, other=0.0)
    v_tile = tl.load(v + of_keys, mask=is_key, other=0.0)
    dk_tile = tl.zeros((KEYS, HEAD_DIM), tl.float32)
    dv_tile = tl.zeros((KEYS, HEAD_DIM), tl.float32)
    for group in range(groups):
        head = kv_head * groups + group
        place = (head % NUM_PATTERNS if NUM_PATTERNS else bounds_row) * NUM_TILES + tile
        whole_first, whole_end, first, end = _runs(table + place * 4)
        of_queries = batch.to(tl.int64) * NUM_QUERIES * stride + head * HEAD_DIM
        of_sums = (batch * NUM_HEADS + head) * PADDED
        dk_tile, dv_tile = _add_gradients(
            dk_tile, dv_tile, k_tile, v_tile, entries + place * NUM_VISITS,
            q + of_queries, do + of_queries, dq + of_queries,
            low, high, lse + of_sums, delta + of_sums, key,
            whole_first, whole_end, 0, 0, False,
            stride, HEAD_DIM, NUM_QUERIES, KEYS, QUERIES, SCALE, SOFTCAP, NUM_PATTERNS, BLOCK,
        )  # fmt: skip
        dk_tile, dv_tile = _add_gradients(
            dk_tile, dv_tile, k_tile, v_tile, entries + place * NUM_VISITS,
            q + of_queries, do + of_queries, dq + of_queries,
            low, high, lse + of_sums, delta + of_sums, key,
            first, end, whole_first, whole_end - whole_first, True,
            stride, HEAD_DIM, NUM_QUERIES, KEYS, QUERIES, SCALE, SOFTCAP, NUM_PATTERNS, BLOCK,
        )  # fmt: skip
    tl.store(dk + of_keys, (dk_tile * SCALE).to(dk.dtype.element_ty), mask=is_key)
    tl.store(dv + of_keys, dv_tile.to(dv.dtype.element_ty), mask=is_key)


def _grid(num_tiles: int, num_heads: int) -> tuple[int, int, int]:
    """The tiles of TOGETHER heads, then those of the next; the first varies fastest."""
    together = min(TOGETHER, num_heads)
    return together, num_tiles, triton.cdiv(num_heads, together)


def _sizes(q: Array, k: Array, low: Array, layout: BlockLayout | None) -> dict[str, Any]:
    """What both kernels are compiled for."""
    batch, length, num_heads, head_dim = q.shape
    return dict(
        BATCH=batch,
        NUM_QUERIES=length,
        NUM_KEYS=k.shape[1],
        NUM_BOUNDS=low.shape[0],
        NUM_HEADS=num_heads,
        KV_HEADS=k.shape[2],
        HEAD_DIM=head_dim,
        NUM_PATTERNS=layout.stride if layout else 0,
        BLOCK=BLOCK,
    )


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
    # Tiles of a layout are of two blocks of queries and one of keys.
    blocks = blocks_of(f"attention.{'layout' if layout else 'forward'}.{head_dim}")
    rows, columns = blocks.rows, blocks.columns
    num_tiles = triton.cdiv(length, rows)
    padded = num_tiles * rows
    low, high = (jnp.pad(x, ((0, 0), (0, padded - length))) for x in (low, high))
    if layout:
        visited = key_visits(layout, padded // BLOCK, triton.cdiv(k.shape[1], BLOCK))
        table, entries = map(jnp.asarray, visited)
    else:
        table = key_tiles(low, high, queries=rows, keys=columns)
        entries = jnp.zeros((1, 1, 1), jnp.int32)
    o_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
    lse_type = jax.ShapeDtypeStruct((batch, num_heads, padded), jnp.float32)
    o, lse = call(
        _forward,
        *(table, entries, low, high, q, k, v),
        out_type=(o_type, lse_type),
        grid=_grid(num_tiles, batch * num_heads),
        blocks=blocks,
        interpret=interpret,
        **_sizes(q, k, low, layout),
        NUM_TILES=num_tiles,
        NUM_VISITS=entries.shape[-1],
        SCALE=scale,
        SOFTCAP=softcap or 0.0,
        ROWS=rows,
        COLUMNS=columns,
    )
    return o, lse[:, :, :length]


def backward(
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
    layout: BlockLayout | None = None,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """Gradients of q, in float32, and of k and v.

    Args:
        q, k, v, low, high, scale, softcap, layout, interpret: as given to the forward.
        do, lse, delta: as `api.gradients`.
    """
    batch, length, _, head_dim = q.shape
    num_keys, kv_heads = k.shape[1:3]
    # Tiles of a layout are of one or two blocks of keys and one of queries.
    blocks = blocks_of(f"attention.{'layout_' if layout else ''}backward.{head_dim}")
    keys, queries = blocks.rows, blocks.columns
    margin = -length % queries
    padded, num_tiles = length + margin, triton.cdiv(num_keys, keys)
    by_row = (0, 0), (0, margin)
    low, high = (jnp.pad(x, by_row) for x in (low, high))
    # With an lse of +inf the probabilities of a query that sees nothing are 0, not NaN.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    by_head = (0, 0), *by_row
    lse = jnp.pad(lse, by_head, constant_values=jnp.inf)
    delta = jnp.pad(delta, by_head)
    if layout:
        size = keys // BLOCK
        visited = query_visits(layout, padded // BLOCK, num_tiles * size, size)
        table, entries = map(jnp.asarray, visited)
    else:
        table = query_tiles(low, high, queries=queries, keys=keys, num_keys=num_keys)
        entries = jnp.zeros((1, 1, 1), jnp.int32)
    wide = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    narrow = jax.ShapeDtypeStruct(k.shape, k.dtype)
    dq, dk, dv = call(
        _backward,
        *(table, entries, low, high, lse, delta, q, k, v, do),
        out_type=(wide, narrow, narrow),
        zeroed=(0,),
        grid=_grid(num_tiles, batch * kv_heads),
        blocks=blocks,
        interpret=interpret,
        **_sizes(q, k, low, layout),
        PADDED=padded,
        NUM_TILES=num_tiles,
        NUM_VISITS=entries.shape[-1],
        SCALE=scale,
        SOFTCAP=softcap or 0.0,
        KEYS=keys,
        QUERIES=queries,
    )
    return dq * scale, dk, dv
