"""Kernels for Hopper GPUs: persistent blocks, one warpgroup fetching and two multiplying; the matmul several share."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a warpgroup's accumulator: what one wgmma instruction multiplies
COMPUTE = 2  # warpgroups that multiply; one more fetches
DEPTH = 64  # of a step: 128 bytes, the widest swizzle
PIECE = 64  # columns that are stored at a time
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
NUM_SMS = 132  # of an H100 or H200
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How a kernel cuts the output.

    Args:
        columns: of the output that a block computes at a time.
        stages: steps of the contraction whose operands are in shared memory.
        minor: dim along which consecutive blocks lie, 0 rows or 1 columns.
        snake: blocks along that dim before the other advances; what they read together stays in the
            L2 cache.
    """

    columns: int = 256
    stages: int = 3
    minor: int = 0
    snake: int = 8


def make_kernel(
    body: Callable, out_type: Any, scratch_types: Any, num_blocks: int, interpret: Any
) -> Callable:
    """A persistent kernel of one block a multiprocessor, of COMPUTE warpgroups that multiply and one that fetches."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(num_blocks,),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True
        ),
        interpret=interpret,
    )


def make_matmul(
    body: Callable,
    out_type: Any,
    blocks: BlockSizes,
    interpret: Any,
    *buffers: Any,
    copies: int = 2,
):
    """A kernel for `multiply_tiles`: a block shares `buffers` and barriers; `copies` bring the operands of a step."""
    barriers = (
        plgpu.Barrier(
            num_arrivals=copies, num_barriers=blocks.stages
        ),  # all operands of a step have come
        plgpu.Barrier(
            num_arrivals=COMPUTE, num_barriers=blocks.stages
        ),  # both warpgroups are done with them
    )
    return make_kernel(
        body, out_type, (*buffers, *barriers), 2 if interpret else NUM_SMS, interpret
    )


def multiply_tiles(
    num_tiles, blocks, full, empty, *, tile_at, fetch, is_needed, multiply, finish, products=1
):
    """Tiles of the output, one after the other; operands of the next ones are fetched while one is written.

    Args:
        tile_at: number -> tile, whose last item is the number of steps of its contraction.
        fetch: (tile, step, slot): starts the copies of both operands.
        is_needed: tile -> whether this warpgroup has a product to make; else it leaves the tensor
            cores to the other.
        multiply: (accumulator, slot, tile, step): adds one step's product.
        finish: (tile, product): stores.
        products: wgmmas in `multiply`.
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
        for slot in range(
            stages
        ):  # a barrier may go only when all that happened to it has been seen
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
                    plgpu.wgmma_wait(products)
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
            product = pl.run_scoped(accumulate, plgpu.ACC((ROWS, blocks.columns), jnp.float32))
            pl.when(is_needed(tile))(lambda: finish(tile, product))
            lax.fori_loop(steps, tile[-1], skip, None)
            return count + tile[-1]

        lax.fori_loop(0, num_mine, one, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def store(product, buffers, target, row, column):
    """Stores [ROWS, columns] piece by piece."""
    for number in range(product.shape[1] // PIECE):
        piece = product[:, number * PIECE : (number + 1) * PIECE]
        store_piece(piece, number, buffers, target, row, column + number * PIECE)


def store_piece(values, number, buffers, target, row, column):
    """Stores the tile's `number`-th [ROWS, PIECE]; one is written to its buffer while the last is on its way."""

    @pl.when((row < target.shape[0]) & (column < target.shape[1]))
    def _():
        plgpu.wait_smem_to_gmem(
            min(number, 1), wait_read_only=True
        )  # none of the tile before, which may end anywhere
        slot = number % 2
        buffers[slot] = values.astype(target.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffers.at[slot], target.at[pl.ds(row, ROWS), pl.ds(column, PIECE)])
