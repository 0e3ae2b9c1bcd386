"""How the Triton attention kernels divide their work: programs and the tiles that each visits."""

from typing import Any

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout, key_tiles, key_visits

# Heads whose programs are started in turn, longest first. Of a head alone the last and longest ones
# would run when most of the GPU is idle; of all at once too much would be in work for the L2 cache.
TOGETHER = 4


def grid_of(num_tiles: int, num_heads: int) -> tuple[int, int, int]:
    """Programs: tiles of TOGETHER heads, then those of the next; the first dim varies fastest."""
    together = min(TOGETHER, num_heads)
    return together, num_tiles, triton.cdiv(num_heads, together)


@triton.jit
def head_number():
    """Which of the heads of all sequences this program of `grid_of` has; some lie past the last."""
    return tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def head_offset(batch, head, LENGTH: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where a head of a sequence begins in an array [B, LENGTH, NUM_HEADS, HEAD_DIM]."""
    stride: tl.constexpr = NUM_HEADS * HEAD_DIM
    return batch.to(tl.int64) * LENGTH * stride + head * HEAD_DIM


@triton.jit
def row_offsets(row, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where the elements of rows [n] of a head lie behind its beginning, [n, HEAD_DIM]."""
    stride: tl.constexpr = NUM_HEADS * HEAD_DIM
    return row.to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def place_of(head, bounds_row, tile, NUM_PATTERNS: tl.constexpr, NUM_TILES: tl.constexpr):
    """The row of the table of visits that a tile has: by pattern, or by the bounds it is under."""
    return (head % NUM_PATTERNS if NUM_PATTERNS else bounds_row) * NUM_TILES + tile


@triton.jit
def runs(table, PARTS: tl.constexpr):
    """(first of the visits of which all see all, their end, first and end of the others).

    The others are numbered as if those in between were missing.
    """
    parts: tl.constexpr = PARTS if PARTS else 1
    first = tl.load(table) * parts
    end = tl.load(table + 1) * parts
    whole_first = tl.load(table + 2) * parts
    whole_end = tl.load(table + 3) * parts
    return whole_first, whole_end, first, end - (whole_end - whole_first)


@triton.jit
def visit(entries, number, skip_from, skip, IS_MASKED: tl.constexpr, PARTS: tl.constexpr):
    """(tile, flags) of the `number`-th visit of a run.

    Args:
        entries: the list of blocks that `tiles.visits` makes, of which each is visited in PARTS.
        skip_from, skip: where masked visits are numbered as if others were missing, and how many.
        PARTS: 0 without a layout, where a tile's place is its number.
    """
    position = number
    if IS_MASKED:
        position = tl.where(number < skip_from, number, number + skip)
    if PARTS:
        entry = tl.load(entries + position // PARTS)
        return (entry >> 2) * PARTS + position % PARTS, entry & 3
    return position, 0


@triton.jit
def seen(key, low, high, flags, row, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, columns] which pairs of a tile and of one that it visits see each other.

    Args:
        key, low, high: places of keys and bounds of queries, the one as rows, the other as columns.
        flags: of the visit, a bit for each block of the program's own tile.
        row: [rows] those of the program's own tile, of which there are ROWS.
    """
    sees = (key >= low) & (key < high)
    if PARTS:
        bit = row % ROWS // BLOCK
        sees = sees & ((flags >> bit) & 1 > 0)[:, None]
    return sees


def key_work(
    low: Array,
    high: Array,
    layout: BlockLayout | None,
    *,
    rows: int,
    columns: int,
    num_keys: int,
) -> tuple[Array, Array]:
    """(table, entries) of what tiles of `rows` queries visit, as `runs` and `visit` read them."""
    if layout is None:
        return key_tiles(low, high, queries=rows, keys=columns), jnp.zeros((1, 1, 1), jnp.int32)
    num_query_blocks, num_key_blocks = low.shape[1] // BLOCK, triton.cdiv(num_keys, BLOCK)
    table, entries = key_visits(layout, num_query_blocks, num_key_blocks, rows // BLOCK)
    return jnp.asarray(table), jnp.asarray(entries)


def pad_queries(
    length: int,
    low: Array,
    high: Array,
    lse: Array,
    delta: Array,
) -> tuple[Array, Array, Array, Array]:
    """Bounds [B, T] and sums [B, N, T] of `length` queries, of which the added ones see nothing."""
    by_row = (0, 0), (0, length - low.shape[1])
    by_head = (0, 0), *by_row
    low, high = jnp.pad(low, by_row), jnp.pad(high, by_row)
    lse = jnp.pad(lse, by_head, constant_values=jnp.inf)
    return low, high, lse, jnp.pad(delta, by_head)


def sizes_of(q: Array, k: Array, low: Array, layout: BlockLayout | None) -> dict[str, Any]:
    """What all of the kernels are compiled for."""
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
