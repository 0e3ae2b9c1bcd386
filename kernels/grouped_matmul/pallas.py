"""Grouped matmul for Hopper GPUs, as Pallas kernels for Mosaic GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.persistent import (
    COMPUTE,
    DEPTH,
    PIECE,
    ROWS,
    SWIZZLED,
    BlockSizes,
    make_matmul,
    multiply_tiles,
    store,
    store_piece,
)

ALIGNMENT = 8  # of the first row of a copy that swizzles: the rows of a swizzled tile


def row_tiles(group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """The tiles of rows that cover every group and the rows past the last.

    A tile begins at a multiple of ALIGNMENT, so the first of a group may begin with rows of the
    group before it.

    Returns:
        [4, tiles] int32: group (the number of groups for the rows past the last), first row, and
        the range of the tile's rows that are the group's; it is empty in what is left over at the
        end.
    """
    tile = COMPUTE * ROWS
    sizes = jnp.concatenate([group_sizes, num_rows - group_sizes.sum(keepdims=True)]).astype(
        jnp.int32
    )
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    aligned = starts - starts % ALIGNMENT
    num_tiles = jnp.where(sizes > 0, -(-(ends - aligned) // tile), 0)
    last = jnp.cumsum(num_tiles)
    number = jnp.arange(num_rows // tile + 2 * sizes.size)
    group = jnp.minimum((number[:, None] >= last).sum(1), sizes.size - 1)
    first = aligned[group] + (number - (last - num_tiles)[group]) * tile
    own = jnp.clip(starts[group] - first, 0, tile), jnp.clip(ends[group] - first, 0, tile)
    return jnp.stack([group, first, *own]).astype(jnp.int32)


class RowTiles:
    """The tiles of `row_tiles` by columns of the output, as a kernel's blocks go through them.

    Args:
        table: reference to `row_tiles`' result.
        num_groups: E.
        num_columns: tiles side by side.
        columns: of the output in a tile.
        steps: of a tile's contraction, if it has any.
    """

    def __init__(self, table, num_groups, num_columns, columns, steps, blocks):
        self.table, self.num_groups, self.steps = table, num_groups, steps
        self.grid, self.columns, self.blocks = (table.shape[1], num_columns), columns, blocks

    def tile_at(self, number):
        """`multiply_tiles`' tile: group, first row, range of the group's rows, first column, steps."""
        i, j = plgpu.planar_snake(number, self.grid, self.blocks.minor, self.blocks.snake)
        group, first, begin, end = (self.table[field, i] for field in range(4))
        has_product = (end > begin) & (group < self.num_groups)
        return group, first, begin, end, j * self.columns, jnp.where(has_product, self.steps, 0)

    def own_rows(self, tile):
        """The range of the warpgroup's rows that are the group's."""
        return tuple(
            jnp.clip(row - lax.axis_index("warpgroup") * ROWS, 0, ROWS) for row in tile[2:4]
        )

    def is_needed(self, tile):
        """Whether the warpgroup has rows of the group."""
        begin, end = self.own_rows(tile)
        return end > begin

    def store_piece(self, tile, values, number, buffers, edge, target, column):
        """Stores the tile's `number`-th [ROWS, PIECE], of which only the group's own rows may be written."""
        first = tile[1] + lax.axis_index("warpgroup") * ROWS
        begin, end = self.own_rows(tile)

        @pl.when(end - begin == ROWS)
        def _():
            store_piece(values, number, buffers, target, first, tile[4] + column)

        @pl.when(end - begin < ROWS)
        def _():
            _store_some(begin, end - begin, values, edge, target, first, tile[4] + column)


@functools.partial(
    jax.jit, static_argnames=("is_transposed", "blocks", "interpret")
)  # lowered once for all layers
def forward(
    lefts: tuple[jax.Array, ...],
    rights: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    *,
    is_transposed: bool,
    blocks: BlockSizes,
    interpret: Any = False,
) -> jax.Array:
    """The sum of products [rows, K] times [E, K, N], or [E, N, K] where `is_transposed`: [rows, N]."""
    num_rows, depth = lefts[0].shape
    num_groups, dtype = rights[0].shape[0], lefts[0].dtype
    width = rights[0].shape[1 if is_transposed else 2]
    table = row_tiles(group_sizes, num_rows)
    num_columns, steps = pl.cdiv(width, blocks.columns), depth // DEPTH

    def body(table_gmem, *refs):
        *operands, out_gmem, left_smem, right_smem, out_smem, edge_smem, full, empty = refs
        warpgroup = lax.axis_index("warpgroup")
        tiles = RowTiles(
            table_gmem, num_groups, num_columns, blocks.columns, steps * len(lefts), blocks
        )

        def fetch(tile, step, slot):
            group, first, _, _, column, _ = tile
            for number, (left, right) in enumerate(
                zip(operands[: len(lefts)], operands[len(lefts) :], strict=True)
            ):

                @pl.when(lax.div(step, steps) == number)
                def _(left=left, right=right, number=number):
                    depth_slice = pl.ds((step - number * steps) * DEPTH, DEPTH)
                    columns = pl.ds(column, blocks.columns)
                    where = (columns, depth_slice) if is_transposed else (depth_slice, columns)
                    rows = left.at[pl.ds(first, COMPUTE * ROWS), depth_slice]
                    plgpu.copy_gmem_to_smem(rows, left_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(
                        right.at[(group, *where)], right_smem.at[slot], full.at[slot]
                    )

        def multiply(accumulator, slot, tile, step):
            left = left_smem.at[slot, pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)]
            right = right_smem.at[slot]
            plgpu.wgmma(accumulator, left, right.transpose((1, 0)) if is_transposed else right)

        def finish(tile, product):
            for number in range(blocks.columns // PIECE):
                column = number * PIECE
                piece = product[:, column : column + PIECE]
                tiles.store_piece(
                    tile,
                    piece,
                    number,
                    out_smem.at[warpgroup],
                    edge_smem.at[warpgroup],
                    out_gmem,
                    column,
                )

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
        jax.ShapeDtypeStruct((num_rows, width), dtype),
        blocks,
        interpret,
        plgpu.SMEM((blocks.stages, COMPUTE * ROWS, DEPTH), dtype, transforms=SWIZZLED),
        plgpu.SMEM((blocks.stages, *right), dtype, transforms=SWIZZLED),
        *out_buffers(dtype),
    )
    return kernel(table, *lefts, *rights)


def out_buffers(dtype: Any) -> tuple[Any, Any]:
    """Of each warpgroup two pieces, and one of which rows are stored: those of a swizzled tile cannot be one by one."""
    return plgpu.SMEM((COMPUTE, 2, ROWS, PIECE), dtype, transforms=SWIZZLED), plgpu.SMEM(
        (COMPUTE, ROWS, PIECE), dtype
    )


@functools.partial(jax.jit, static_argnames=("blocks", "interpret"))
def weight_gradient(
    rows: jax.Array,
    cotangent: jax.Array,
    group_sizes: jax.Array,
    *,
    blocks: BlockSizes,
    interpret: Any = False,
) -> jax.Array:
    """Each group's [K, rows] times [rows, N]: [E, K, N] of rows [rows, K] and cotangent [rows, N]."""
    depth, width = rows.shape[1], cotangent.shape[1]
    num_groups = group_sizes.size
    ends = jnp.cumsum(group_sizes)
    table = jnp.stack([ends - group_sizes, ends]).astype(jnp.int32)
    num_tiles, num_columns = pl.cdiv(depth, COMPUTE * ROWS), pl.cdiv(width, blocks.columns)

    def body(
        table_gmem,
        rows_gmem,
        cotangent_gmem,
        out_gmem,
        rows_smem,
        cotangent_smem,
        out_smem,
        full,
        empty,
    ):
        warpgroup = lax.axis_index("warpgroup")
        own = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)

        def tile_at(number):
            group = lax.div(number, num_tiles * num_columns)
            within = lax.rem(number, num_tiles * num_columns)
            i, j = plgpu.planar_snake(within, (num_tiles, num_columns), blocks.minor, blocks.snake)
            start, end = table_gmem[0, group], table_gmem[1, group]
            first = start - lax.rem(start, ALIGNMENT)
            steps = jnp.where(end > start, lax.div(end - first + DEPTH - 1, DEPTH), 0)
            return (
                group,
                first,
                start - first,
                end - first,
                i * COMPUTE * ROWS,
                j * blocks.columns,
                steps,
            )

        def fetch(tile, step, slot):
            _, first, _, _, row, column, _ = tile
            depth_slice = pl.ds(first + step * DEPTH, DEPTH)
            left = rows_gmem.at[depth_slice, pl.ds(row, COMPUTE * ROWS)]
            plgpu.copy_gmem_to_smem(left, rows_smem.at[slot], full.at[slot])
            right = cotangent_gmem.at[depth_slice, pl.ds(column, blocks.columns)]
            plgpu.copy_gmem_to_smem(right, cotangent_smem.at[slot], full.at[slot])

        def multiply(accumulator, slot, tile, step):
            left = rows_smem.at[slot, :, own]
            begin, end = tile[2] - step * DEPTH, tile[3] - step * DEPTH

            @pl.when((begin > 0) | (end < DEPTH))
            def _():  # the other rows are other groups'
                layout = plgpu.Layout.WGMMA
                values = left[...]
                number = plgpu.broadcasted_iota(jnp.int32, (DEPTH, ROWS), 0, layout=layout)
                left[...] = jnp.where(
                    (number >= begin) & (number < end), values, jnp.zeros_like(values)
                )
                plgpu.commit_smem()

            plgpu.wgmma(accumulator, left.transpose((1, 0)), cotangent_smem.at[slot])

        def finish(tile, product):
            group, _, _, _, row, column, _ = tile
            store(
                product, out_smem.at[warpgroup], out_gmem.at[group], row + warpgroup * ROWS, column
            )

        multiply_tiles(
            num_groups * num_tiles * num_columns,
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
        plgpu.SMEM((blocks.stages, DEPTH, COMPUTE * ROWS), rows.dtype, transforms=SWIZZLED),
        plgpu.SMEM((blocks.stages, DEPTH, blocks.columns), rows.dtype, transforms=SWIZZLED),
        plgpu.SMEM((COMPUTE, 2, ROWS, PIECE), rows.dtype, transforms=SWIZZLED),
    )
    return kernel(table, rows, cotangent)


def _store_some(begin, size, values, buffer, target, row, column):
    """Stores `size` < ROWS rows from `begin` on: copies have static sizes, so one for each bit of the number."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer[...] = values.astype(target.dtype)
    plgpu.commit_smem()
    for rows in (32, 16, 8, 4, 2, 1):
        first = begin + (size & -2 * rows)  # behind what the larger copies have taken

        @pl.when((size & rows != 0) & (column < target.shape[1]))
        def _(first=first, rows=rows):
            where = pl.ds(row + first, rows), pl.ds(column, PIECE)
            plgpu.copy_smem_to_gmem(buffer.at[pl.ds(first, rows)], target.at[where])
