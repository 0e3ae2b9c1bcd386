"""Grouped matmul for any NVIDIA GPU since Ampere, as Triton kernels.

A program computes one tile of the output. Tiles begin wherever their group does, so that none holds
rows of two groups.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from jaxscale.kernels.grouped_matmul.tiles import row_tiles
from jaxscale.kernels.triton_call import blocks_of, call
from jaxscale.kernels.triton_matmul import BAND, add_product, place


@triton.jit
def _product(
    table,
    left,
    right,
    second_left,
    second_right,
    out,
    NUM_TILES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile of rows times one tile of columns of their group's matrix, for one or two pairs."""
    tile, column_tile = place(tl.program_id(0), NUM_TILES, tl.cdiv(WIDTH, COLUMNS), BAND)
    group = tl.load(table + tile)
    start = tl.load(table + NUM_TILES + tile)
    end = tl.load(table + 2 * NUM_TILES + tile)
    if start >= end:
        return
    row = start + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    # A tile's last rows may be another group's; they are neither read nor stored.
    row_read = tl.minimum(row, end - 1)
    # The rows past the last group have no matrix.
    depth = tl.where(group < NUM_GROUPS, DEPTH, 0)
    matrix = tl.minimum(group, NUM_GROUPS - 1).to(tl.int64) * (DEPTH * WIDTH)
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    accumulator = add_product(
        left, right + matrix, accumulator, row_read, column, depth,
        DEPTH, WIDTH, IS_TRANSPOSED, COLUMNS, STEP,
    )  # fmt: skip
    if NUM_PAIRS == 2:
        accumulator = add_product(
            second_left, second_right + matrix, accumulator, row_read, column, depth,
            DEPTH, WIDTH, IS_TRANSPOSED, COLUMNS, STEP,
        )  # fmt: skip
    out += row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    is_stored = (row < end)[:, None] & (column < WIDTH)[None, :]
    tl.store(out, accumulator.to(out.dtype.element_ty), mask=is_stored)


@triton.jit
def _weight_gradient(
    ends,
    rows,
    cotangent,
    out,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile of one group's matrix; the contraction runs over the group's rows."""
    num_rows, num_columns = tl.cdiv(DEPTH, ROWS), tl.cdiv(WIDTH, COLUMNS)
    group = tl.program_id(0) // (num_rows * num_columns)
    number = tl.program_id(0) % (num_rows * num_columns)
    i, j = place(number, num_rows, num_columns, BAND)
    start = tl.load(ends + group)
    end = tl.load(ends + group + 1)
    depth = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, STEP)
    first_row = start.to(tl.int64) + k
    rows += depth[:, None] + first_row[None, :] * DEPTH
    cotangent += first_row[:, None] * WIDTH + column[None, :]
    is_depth = (depth < DEPTH)[:, None]
    is_column = (column < WIDTH)[None, :]
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(start, end, STEP):
        is_row = first + k < end
        a = tl.load(rows, mask=is_row[None, :] & is_depth, other=0.0)
        b = tl.load(cotangent, mask=is_row[:, None] & is_column, other=0.0)
        accumulator = tl.dot(a, b, accumulator)
        rows += STEP * DEPTH
        cotangent += STEP * WIDTH
    out += group.to(tl.int64) * (DEPTH * WIDTH) + depth[:, None] * WIDTH + column[None, :]
    tl.store(out, accumulator.to(out.dtype.element_ty), mask=is_depth & is_column)


def forward(
    lefts: tuple[Array, ...],
    rights: tuple[Array, ...],
    group_sizes: Array,
    *,
    is_transposed: bool,
    interpret: Any = False,
) -> Array:
    """The sum of the grouped products of one or two `lefts`, each with its one of `rights`.

    Args:
        lefts: [rows, depth] each.
        rights: [E, depth, width] each, or [E, width, depth] where `is_transposed`.
        group_sizes: [E] int32.
    Returns:
        [rows, width].
    """
    blocks = blocks_of("grouped_matmul.forward")
    num_rows, depth = lefts[0].shape
    width = rights[0].shape[1 if is_transposed else 2]
    group, first, begin, end = row_tiles(group_sizes, num_rows, tile=blocks.rows, alignment=1)
    table = jnp.stack([group, first + begin, first + end])
    num_tiles = table.shape[1]
    (out,) = call(
        _product,
        table,
        lefts[0],
        rights[0],
        lefts[-1],
        rights[-1],
        out_type=(jax.ShapeDtypeStruct((num_rows, width), lefts[0].dtype),),
        grid=(num_tiles * triton.cdiv(width, blocks.columns),),
        blocks=blocks,
        interpret=interpret,
        NUM_TILES=num_tiles,
        NUM_GROUPS=group_sizes.size,
        NUM_PAIRS=len(lefts),
        DEPTH=depth,
        WIDTH=width,
        IS_TRANSPOSED=is_transposed,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        STEP=blocks.depth,
        BAND=BAND,
    )
    return out


def weight_gradient(
    rows: Array,
    cotangent: Array,
    group_sizes: Array,
    *,
    interpret: Any = False,
) -> Array:
    """Each group's rows [rows, D], transposed, times its rows of the cotangent [rows, F].

    Returns:
        [E, D, F].
    """
    blocks = blocks_of("grouped_matmul.weight_gradient")
    depth, width, num_groups = rows.shape[1], cotangent.shape[1], group_sizes.size
    ends = jnp.pad(jnp.cumsum(group_sizes), (1, 0)).astype(jnp.int32)
    num_tiles = triton.cdiv(depth, blocks.rows) * triton.cdiv(width, blocks.columns)
    (out,) = call(
        _weight_gradient,
        ends,
        rows,
        cotangent,
        out_type=(jax.ShapeDtypeStruct((num_groups, depth, width), rows.dtype),),
        grid=(num_groups * num_tiles,),
        blocks=blocks,
        interpret=interpret,
        DEPTH=depth,
        WIDTH=width,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        STEP=blocks.depth,
        BAND=BAND,
    )
    return out
