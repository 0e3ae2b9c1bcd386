"""Grouped matmul for Hopper GPUs, as Pallas kernels for Mosaic GPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.grouped_matmul.block_sizes import BlockSizes

ROWS = 64  # of a warpgroup's accumulator: what one wgmma instruction multiplies
COMPUTE = 2  # warpgroups that multiply; one more fetches
DEPTH = 64  # of a step: 128 bytes, the widest swizzle
ALIGNMENT = 8  # of the first row of a copy that swizzles: the rows of a swizzled tile
PIECE = 64  # columns that are stored at a time
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
NUM_SMS = 132  # of an H100 or H200


def row_tiles(group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """The tiles of rows that cover every group and the rows past the last.

    A tile begins at a multiple of ALIGNMENT, so the first of a group may begin with rows of the group before it.

    Returns:
        [4, tiles] int32: group (the number of groups for the rows past the last), first row, and the range of the
        tile's rows that are the group's; it is empty in what is left over at the end.
    """
    tile = COMPUTE * ROWS
    sizes = jnp.concatenate([group_sizes, num_rows - group_sizes.sum(keepdims=True)]).astype(jnp.int32)
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


@functools.partial(jax.jit, static_argnames=("is_transposed", "blocks", "interpret"))  # lowered once for all layers
def forward(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, is_transposed: bool, blocks: BlockSizes,
    interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """[rows, K] times [E, K, N], or [E, N, K] where `is_transposed`, to [rows, N]."""
    num_rows, depth = rows.shape
    num_groups = weights.shape[0]
    width = weights.shape[1 if is_transposed else 2]
    table = row_tiles(group_sizes, num_rows)
    num_tiles, num_columns = table.shape[1], pl.cdiv(width, blocks.columns)
    steps = depth // DEPTH

    def body(table_gmem, rows_gmem, weights_gmem, out_gmem, rows_smem, weights_smem, out_smem, edge_smem, full, empty):
        warpgroup = lax.axis_index("warpgroup")

        def tile_at(number):
            i, j = plgpu.planar_snake(number, (num_tiles, num_columns), blocks.minor, blocks.snake)
            group, first, begin, end = (table_gmem[field, i] for field in range(4))
            has_product = (end > begin) & (group < num_groups)
            return group, first, begin, end, j * blocks.columns, jnp.where(has_product, steps, 0)

        def own_rows(tile):
            return tuple(jnp.clip(row - warpgroup * ROWS, 0, ROWS) for row in tile[2:4])

        def is_needed(tile):
            begin, end = own_rows(tile)
            return end > begin

        def fetch(tile, step, slot):
            group, first, _, _, column, _ = tile
            depth_slice, columns = pl.ds(step * DEPTH, DEPTH), pl.ds(column, blocks.columns)
            where = (columns, depth_slice) if is_transposed else (depth_slice, columns)
            plgpu.copy_gmem_to_smem(
                rows_gmem.at[pl.ds(first, COMPUTE * ROWS), depth_slice], rows_smem.at[slot], full.at[slot]
            )
            plgpu.copy_gmem_to_smem(weights_gmem.at[(group, *where)], weights_smem.at[slot], full.at[slot])

        def multiply(accumulator, slot, tile, step):
            right = weights_smem.at[slot]
            plgpu.wgmma(
                accumulator,
                rows_smem.at[slot, pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)],
                right.transpose((1, 0)) if is_transposed else right,
            )

        def finish(tile, product):
            _, first, _, _, column, _ = tile
            first += warpgroup * ROWS
            begin, end = own_rows(tile)

            @pl.when(end - begin == ROWS)
            def _():
                _store(product, out_smem.at[warpgroup], out_gmem, first, column)

            @pl.when((end > begin) & (end - begin < ROWS))
            def _():
                _store_some(begin, end - begin, product, edge_smem.at[warpgroup], out_gmem, first, column)

        _persistent(
            num_tiles * num_columns, blocks, full, empty,
            tile_at=tile_at, fetch=fetch, is_needed=is_needed, multiply=multiply, finish=finish,
        )  # fmt: skip

    right = (blocks.columns, DEPTH) if is_transposed else (DEPTH, blocks.columns)
    kernel = _kernel(
        body,
        jax.ShapeDtypeStruct((num_rows, width), rows.dtype),
        blocks,
        interpret,
        plgpu.SMEM((blocks.stages, COMPUTE * ROWS, DEPTH), rows.dtype, transforms=SWIZZLED),
        plgpu.SMEM((blocks.stages, *right), rows.dtype, transforms=SWIZZLED),
        plgpu.SMEM((COMPUTE, 2, ROWS, PIECE), rows.dtype, transforms=SWIZZLED),
        plgpu.SMEM((COMPUTE, ROWS, PIECE), rows.dtype),  # rows of a swizzled tile cannot be stored one by one
    )
    return kernel(table, rows, weights)


@functools.partial(jax.jit, static_argnames=("blocks", "interpret"))
def weight_gradient(
    rows: jax.Array, cotangent: jax.Array, group_sizes: jax.Array, *, blocks: BlockSizes, interpret: Any = False
) -> jax.Array:
    """Each group's [K, rows] times [rows, N]: [E, K, N] of rows [rows, K] and cotangent [rows, N]."""
    depth, width = rows.shape[1], cotangent.shape[1]
    num_groups = group_sizes.size
    ends = jnp.cumsum(group_sizes)
    table = jnp.stack([ends - group_sizes, ends]).astype(jnp.int32)
    num_tiles, num_columns = pl.cdiv(depth, COMPUTE * ROWS), pl.cdiv(width, blocks.columns)

    def body(table_gmem, rows_gmem, cotangent_gmem, out_gmem, rows_smem, cotangent_smem, out_smem, full, empty):
        warpgroup = lax.axis_index("warpgroup")
        own = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)

        def tile_at(number):
            group = lax.div(number, num_tiles * num_columns)
            within = lax.rem(number, num_tiles * num_columns)
            i, j = plgpu.planar_snake(within, (num_tiles, num_columns), blocks.minor, blocks.snake)
            start, end = table_gmem[0, group], table_gmem[1, group]
            first = start - lax.rem(start, ALIGNMENT)
            steps = jnp.where(end > start, lax.div(end - first + DEPTH - 1, DEPTH), 0)
            return group, first, start - first, end - first, i * COMPUTE * ROWS, j * blocks.columns, steps

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
                left[...] = jnp.where((number >= begin) & (number < end), values, jnp.zeros_like(values))
                plgpu.commit_smem()

            plgpu.wgmma(accumulator, left.transpose((1, 0)), cotangent_smem.at[slot])

        def finish(tile, product):
            group, _, _, _, row, column, _ = tile
            _store(product, out_smem.at[warpgroup], out_gmem.at[group], row + warpgroup * ROWS, column)

        _persistent(
            num_groups * num_tiles * num_columns, blocks, full, empty,
            tile_at=tile_at, fetch=fetch, is_needed=lambda tile: True, multiply=multiply, finish=finish,
        )  # fmt: skip

    kernel = _kernel(
        body,
        jax.ShapeDtypeStruct((num_groups, depth, width), rows.dtype),
        blocks,
        interpret,
        plgpu.SMEM((blocks.stages, DEPTH, COMPUTE * ROWS), rows.dtype, transforms=SWIZZLED),
        plgpu.SMEM((blocks.stages, DEPTH, blocks.columns), rows.dtype, transforms=SWIZZLED),
        plgpu.SMEM((COMPUTE, 2, ROWS, PIECE), rows.dtype, transforms=SWIZZLED),
    )
    return kernel(table, rows, cotangent)


def _kernel(body: Callable, out_type: jax.ShapeDtypeStruct, blocks: BlockSizes, interpret: Any, *buffers: Any):
    """A persistent kernel of one block a multiprocessor, whose three warpgroups share `buffers` and the barriers."""
    barriers = (
        plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),  # both operands have come
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=blocks.stages),  # both warpgroups are done with them
    )
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=(*buffers, *barriers),
        grid=(2 if interpret else NUM_SMS,),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )


def _persistent(num_tiles, blocks, full, empty, *, tile_at, fetch, is_needed, multiply, finish):
    """Tiles of the output, one after the other; operands of the next ones are fetched while one is written.

    Args:
        tile_at: number -> tile, whose last item is the number of steps of its contraction.
        fetch: (tile, step, slot): starts the copies of both operands.
        is_needed: tile -> whether this warpgroup has a product to make; else it leaves the tensor cores to the other.
        multiply: (accumulator, slot, tile, step): adds one step's product.
        finish: (tile, product): stores.
    """
    stages = blocks.stages
    first, stride = lax.axis_index("sm"), lax.axis_size("sm")
    num_mine = lax.div(num_tiles - first + stride - 1, stride)

    @pl.when(lax.axis_index("warpgroup") == COMPUTE)
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")

        def one(i, count):
            tile = tile_at(first + i * stride)

            def step(k, count):
                slot = lax.rem(count, stages)
                pl.when(count >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                fetch(tile, k, slot)
                return count + 1

            return lax.fori_loop(0, tile[-1], step, count)

        count = lax.fori_loop(0, num_mine, one, jnp.int32(0))
        for slot in range(stages):  # a barrier may go only when all that happened to it has been seen
            pl.when(count > slot)(lambda slot=slot: plgpu.barrier_wait(empty.at[slot]))

    @pl.when(lax.axis_index("warpgroup") < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        def release(count):
            plgpu.barrier_arrive(empty.at[lax.rem(count, stages)])

        def one(i, count):
            tile = tile_at(first + i * stride)

            def accumulate(accumulator):
                def step(k, count):
                    slot = lax.rem(count, stages)
                    plgpu.barrier_wait(full.at[slot])
                    multiply(accumulator, slot, tile, k)
                    plgpu.wgmma_wait(1)
                    pl.when(k > 0)(lambda: release(count - 1))
                    return count + 1

                lax.fori_loop(0, steps, step, count)
                plgpu.wgmma_wait(0)
                pl.when(steps > 0)(lambda: release(count + steps - 1))
                return accumulator[...]

            def skip(k, _):
                plgpu.barrier_wait(full.at[lax.rem(count + k, stages)])
                release(count + k)

            steps = jnp.where(is_needed(tile), tile[-1], 0)
            finish(tile, pl.run_scoped(accumulate, plgpu.ACC((ROWS, blocks.columns), jnp.float32)))
            lax.fori_loop(steps, tile[-1], skip, None)
            return count + tile[-1]

        lax.fori_loop(0, num_mine, one, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _store(product, buffers, target, row, column):
    """Stores [ROWS, columns] piece by piece; one is written to its buffer while the other's is on its way."""
    product = product.astype(target.dtype)
    for piece in range(product.shape[1] // PIECE):
        slot, start = piece % 2, column + piece * PIECE

        @pl.when((row < target.shape[0]) & (start < target.shape[1]))
        def _(slot=slot, start=start, piece=piece):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            buffers[slot] = product[:, piece * PIECE : (piece + 1) * PIECE]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffers.at[slot], target.at[pl.ds(row, ROWS), pl.ds(start, PIECE)])


def _store_some(begin, size, product, buffer, target, row, column):
    """Stores `size` < ROWS rows from `begin` on: copies have static sizes, so one for each bit of the number."""
    product = product.astype(target.dtype)
    for piece in range(product.shape[1] // PIECE):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = product[:, piece * PIECE : (piece + 1) * PIECE]
        plgpu.commit_smem()
        start = column + piece * PIECE
        for rows in (32, 16, 8, 4, 2, 1):
            first = begin + (size & -2 * rows)  # behind what the larger copies have taken

            @pl.when((size & rows != 0) & (start < target.shape[1]))
            def _(first=first, rows=rows, start=start):
                where = pl.ds(row + first, rows), pl.ds(start, PIECE)
                plgpu.copy_smem_to_gmem(buffer.at[pl.ds(first, rows)], target.at[where])
