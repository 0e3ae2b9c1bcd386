"""Grouped matmul for Hopper GPUs, as Pallas kernels for Mosaic GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.grouped_matmul.tiles import row_tiles
from jaxscale.kernels.persistent import (
    COMPUTE,
    DEPTH,
    PIECE,
    ROWS,
    TILE_ROWS,
    BlockSizes,
    make_matmul,
    multiply_tiles,
    part,
    store,
    store_piece,
    swizzled,
)

# A copy that swizzles begins at a multiple of so many rows: those of a swizzled tile.
ALIGNMENT = 8


def cover(group_sizes: Array, num_rows: int, needs_tail: bool) -> Array:
    """`row_tiles` of a block's rows.

    Of a tail that nobody needs one tile is covered all the same, whose rows give zero: a step of
    `weight_gradient` reads up to DEPTH - 1 rows past the last group and multiplies them by zero,
    which must not meet an infinity.
    """
    return row_tiles(
        group_sizes, num_rows, tile=TILE_ROWS, alignment=ALIGNMENT, needs_tail=needs_tail
    )


class RowTiles:
    """The tiles of `row_tiles` times tiles of columns, as a kernel's blocks go through them.

    Args:
        table: reference to the result of `row_tiles`.
        num_groups: E.
        num_columns: number of tiles side by side.
        columns: columns of the output in a tile.
        steps: number of steps of a tile's contraction, if it has any.
        blocks: how the output is cut.
    """

    def __init__(self, table, num_groups, num_columns, columns, steps, blocks):
        self.table = table
        self.num_groups = num_groups
        self.grid = (table.shape[1], num_columns)
        self.columns = columns
        self.steps = steps
        self.blocks = blocks

    def tile_at(self, number):
        """A tile of `multiply_tiles`.

        (group, first row, begin and end of the group's rows, first column, steps).
        """
        i, j = self.blocks.place(number, self.grid)
        group, first, begin, end = (self.table[field, i] for field in range(4))
        has_product = (end > begin) & (group < self.num_groups)
        column = j * self.columns
        steps = jnp.where(has_product, self.steps, 0)
        return group, first, begin, end, column, steps

    def group_rows(self, tile):
        """Begin and end of the group's rows among those of this warpgroup."""
        _, _, begin, end, _, _ = tile

        def within(row):
            return jnp.clip(row - lax.axis_index("warpgroup") * ROWS, 0, ROWS)

        return within(begin), within(end)

    def is_needed(self, tile):
        """Whether this warpgroup has rows of the group."""
        begin, end = self.group_rows(tile)
        return end > begin

    def store_piece(
        self,
        tile,
        values,
        number,
        buffers,
        edge,
        target,
        column,
    ):
        """Stores the tile's `number`-th piece [ROWS, PIECE], but only the group's rows of it."""
        _, first, _, _, first_column, _ = tile
        first = first + lax.axis_index("warpgroup") * ROWS
        begin, end = self.group_rows(tile)

        @pl.when(end - begin == ROWS)
        def _():
            store_piece(values, number, buffers, target, first, first_column + column)

        @pl.when(end - begin < ROWS)
        def _():
            size = end - begin
            _store_some(begin, size, values, edge, target, first, first_column + column)


# jit: the kernel is lowered once for all layers.
@functools.partial(
    jax.jit, static_argnames=("is_transposed", "needs_tail", "blocks", "dtype", "interpret")
)
def forward(
    lefts: tuple[Array, ...],
    rights: tuple[Array, ...],
    group_sizes: Array,
    *,
    is_transposed: bool,
    needs_tail: bool = True,
    blocks: BlockSizes,
    dtype: Any = None,
    interpret: Any = False,
) -> Array:
    """The sum of the grouped products of each of `lefts` with its one of `rights`.

    Args:
        lefts: [rows, depth] each.
        rights: [E, depth, width] each, or [E, width, depth] where `is_transposed`.
        group_sizes: [E] int32.
        needs_tail: as in `api.feed_forward`.
        dtype: of the result; None for that of `lefts`.
    Returns:
        [rows, width].
    """
    num_rows, depth = lefts[0].shape
    num_groups = rights[0].shape[0]
    width = rights[0].shape[1 if is_transposed else 2]
    table = cover(group_sizes, num_rows, needs_tail)
    num_columns, steps = pl.cdiv(width, blocks.columns), depth // DEPTH
    all_steps = steps * len(lefts)

    def body(table_gmem, *refs):
        *operands, out_gmem, left_smem, right_smem, out_smem, edge_smem, full, empty = refs
        pairs = list(zip(operands[: len(lefts)], operands[len(lefts) :], strict=True))
        warpgroup = lax.axis_index("warpgroup")
        tiles = RowTiles(table_gmem, num_groups, num_columns, blocks.columns, all_steps, blocks)

        def fetch(tile, step, slot):
            group, first, _, _, column, _ = tile

            def fetch_of(left, right, step):
                depth_slice = pl.ds(step * DEPTH, DEPTH)
                columns = pl.ds(column, blocks.columns)
                where = (columns, depth_slice) if is_transposed else (depth_slice, columns)
                rows = left.at[pl.ds(first, TILE_ROWS), depth_slice]
                plgpu.copy_gmem_to_smem(rows, left_smem.at[slot], full.at[slot])
                weights = right.at[(group, *where)]
                plgpu.copy_gmem_to_smem(weights, right_smem.at[slot], full.at[slot])

            # One product after the other: the step says of which pair.
            for number, (left, right) in enumerate(pairs):

                @pl.when(lax.div(step, steps) == number)
                def _(left=left, right=right, number=number):
                    fetch_of(left, right, step - number * steps)

        def multiply(accumulator, slot, tile, step):
            mine = part(warpgroup, ROWS)
            left, right = left_smem.at[slot, mine], right_smem.at[slot]
            right = right.transpose((1, 0)) if is_transposed else right
            plgpu.wgmma(accumulator, left, right)

        def finish(tile, product):
            buffers, edge = out_smem.at[warpgroup], edge_smem.at[warpgroup]
            for number in range(blocks.columns // PIECE):
                column = number * PIECE
                piece = product[:, column : column + PIECE]
                tiles.store_piece(tile, piece, number, buffers, edge, out_gmem, column)

        multiply_tiles(
            table.shape[1] * num_columns,
            blocks,
            full,
            empty,
            tile_at=tiles.tile_at,
            fetch=fetch,
            is_needed=tiles.is_needed,
            multiply=multiply,
            finish=finish,
        )

    right = (blocks.columns, DEPTH) if is_transposed else (DEPTH, blocks.columns)
    kernel = make_matmul(
        body,
        jax.ShapeDtypeStruct((num_rows, width), dtype or lefts[0].dtype),
        blocks,
        interpret,
        swizzled((blocks.stages, TILE_ROWS, DEPTH), lefts[0].dtype),
        swizzled((blocks.stages, *right), lefts[0].dtype),
        *out_buffers(dtype or lefts[0].dtype),
    )
    return kernel(table, *lefts, *rights)


def out_buffers(dtype: Any) -> tuple[Any, Any]:
    """Shared memory from which `RowTiles.store_piece` stores.

    Each warpgroup has two pieces in turn, and one more from which single rows are stored: it is not
    swizzled, because the rows of a swizzled tile cannot be copied one by one.
    """
    pieces = swizzled((COMPUTE, 2, ROWS, PIECE), dtype)
    edge = plgpu.SMEM((COMPUTE, ROWS, PIECE), dtype)
    return pieces, edge


@functools.partial(jax.jit, static_argnames=("blocks", "interpret"))
def weight_gradient(
    rows: Array,
    cotangent: Array,
    group_sizes: Array,
    *,
    blocks: BlockSizes,
    interpret: Any = False,
) -> Array:
    """Each group's rows, transposed, times its rows of the cotangent.

    Args:
        rows: [rows, D].
        cotangent: [rows, F].
        group_sizes: [E] int32.
    Returns:
        [E, D, F].
    """
    depth, width = rows.shape[1], cotangent.shape[1]
    num_groups = group_sizes.size
    ends = jnp.cumsum(group_sizes)
    table = jnp.stack([ends - group_sizes, ends]).astype(jnp.int32)
    grid = pl.cdiv(depth, TILE_ROWS), pl.cdiv(width, blocks.columns)
    tiles_of_group = grid[0] * grid[1]

    def body(*refs):
        table_gmem, rows_gmem, cotangent_gmem, out_gmem, *scratch = refs
        rows_smem, cotangent_smem, out_smem, full, empty = scratch
        warpgroup = lax.axis_index("warpgroup")
        mine = part(warpgroup, ROWS)

        def tile_at(number):
            """(group, first row, begin and end of the group's from there, place, steps)."""
            group = lax.div(number, tiles_of_group)
            within = lax.rem(number, tiles_of_group)
            i, j = blocks.place(within, grid)
            start, end = table_gmem[0, group], table_gmem[1, group]
            first = start - lax.rem(start, ALIGNMENT)
            has_rows = end > start
            steps = lax.div(end - first + DEPTH - 1, DEPTH)
            steps = jnp.where(has_rows, steps, 0)
            begin, end = start - first, end - first
            place = i * TILE_ROWS, j * blocks.columns
            return group, first, begin, end, *place, steps

        def fetch(tile, step, slot):
            _, first, _, _, row, column, _ = tile
            depth_slice = pl.ds(first + step * DEPTH, DEPTH)
            left = rows_gmem.at[depth_slice, pl.ds(row, TILE_ROWS)]
            plgpu.copy_gmem_to_smem(left, rows_smem.at[slot], full.at[slot])
            right = cotangent_gmem.at[depth_slice, pl.ds(column, blocks.columns)]
            plgpu.copy_gmem_to_smem(right, cotangent_smem.at[slot], full.at[slot])

        def multiply(accumulator, slot, tile, step):
            left = rows_smem.at[slot, :, mine]
            begin, end = (edge - step * DEPTH for edge in tile[2:4])

            # The first and the last step may hold rows of other groups.
            @pl.when((begin > 0) | (end < DEPTH))
            def _():
                values = left[...]
                layout = plgpu.Layout.WGMMA
                row = plgpu.broadcasted_iota(jnp.int32, (DEPTH, ROWS), 0, layout=layout)
                is_of_group = (row >= begin) & (row < end)
                left[...] = jnp.where(is_of_group, values, jnp.zeros_like(values))
                plgpu.commit_smem()

            plgpu.wgmma(accumulator, left.transpose((1, 0)), cotangent_smem.at[slot])

        def finish(tile, product):
            group, _, _, _, row, column, _ = tile
            buffers, target = out_smem.at[warpgroup], out_gmem.at[group]
            store(product, buffers, target, row + warpgroup * ROWS, column)

        multiply_tiles(
            num_groups * tiles_of_group,
            blocks,
            full,
            empty,
            tile_at=tile_at,
            fetch=fetch,
            is_needed=lambda tile: True,
            multiply=multiply,
            finish=finish,
        )

    kernel = make_matmul(
        body,
        jax.ShapeDtypeStruct((num_groups, depth, width), rows.dtype),
        blocks,
        interpret,
        swizzled((blocks.stages, DEPTH, TILE_ROWS), rows.dtype),
        swizzled((blocks.stages, DEPTH, blocks.columns), rows.dtype),
        swizzled((COMPUTE, 2, ROWS, PIECE), rows.dtype),
    )
    return kernel(table, rows, cotangent)


def _store_some(begin, size, values, buffer, target, row, column):
    """Stores `size` < ROWS rows from `begin` on.

    Copies have static sizes, so there is one for each bit of the number of rows.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer[...] = values.astype(target.dtype)
    plgpu.commit_smem()
    for rows in (32, 16, 8, 4, 2, 1):
        # Behind what the larger copies have taken.
        first = begin + (size & -2 * rows)

        @pl.when((size & rows != 0) & (column < target.shape[1]))
        def _(first=first, rows=rows):
            place = target.at[pl.ds(row + first, rows), pl.ds(column, PIECE)]
            plgpu.copy_smem_to_gmem(buffer.at[pl.ds(first, rows)], place)
