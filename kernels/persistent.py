"""Persistent kernels for Hopper GPUs, and the matmul that several of them share.

A persistent kernel runs one block on each multiprocessor, which computes one tile of the output
after the other. Of its three warpgroups one copies operands into shared memory and two multiply.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # rows of a warpgroup's accumulator: what one wgmma instruction multiplies
COMPUTE = 2  # warpgroups that multiply; one more fetches
TILE_ROWS = COMPUTE * ROWS  # rows of a block's tile
DEPTH = 64  # elements of the contraction in one step: 128 bytes, the widest swizzle
PIECE = 64  # columns that are stored at a time
NUM_SMS = 132  # multiprocessors of an H100 or H200
LOG2E = math.log2(math.e)


def zeros_after(x: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """(x, float32 zeros that wait for it), for sums that a kernel adds to in memory.

    XLA would fill the zeros of all calls in a program before the first one.
    """
    x, zero = lax.optimization_barrier((x, jnp.zeros((), jnp.float32)))
    return x, jnp.broadcast_to(zero, shape)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How a kernel cuts the output.

    Args:
        columns: columns of the output that a block computes at a time.
        stages: steps of the contraction whose operands are in shared memory.
        minor: dim along which consecutive blocks lie, 0 for rows or 1 for columns.
        snake: number of blocks along that dim before the other dim advances. What they read
            together stays in the L2 cache.
    """

    columns: int = 256
    stages: int = 3
    minor: int = 0
    snake: int = 8

    def place(
        self,
        number: Any,
        grid: tuple[int, int],
    ) -> tuple[Any, Any]:
        """(row, column) in a grid of tiles of the `number`-th tile that is computed."""
        return plgpu.planar_snake(number, grid, self.minor, self.snake)


def swizzled(shape: tuple[int, ...], dtype: Any, row_bytes: int = 128) -> Any:
    """Shared memory that wgmma reads without bank conflicts.

    It lies in tiles of 8 rows of 128, 64 or 32 bytes, of which the widest is copied fastest.
    Operands of one product have the same, and a part of an array begins at a tile.
    """
    columns = row_bytes // jnp.dtype(dtype).itemsize
    tiles = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(row_bytes)
    return plgpu.SMEM(shape, dtype, transforms=tiles)


def part(number: Any, size: int) -> Any:
    """A slice: the `number`-th of equal parts."""
    return pl.ds(pl.multiple_of(number * size, size), size)


def pad_to_units(x: Array, units: tuple[int, ...]) -> Array:
    """`x` with zeros up to a multiple of a unit in each dim; a copy where there are any."""
    margins = [(0, -size % unit) for size, unit in zip(x.shape, units, strict=True)]
    return jnp.pad(x, margins)


def make_kernel(
    body: Callable,
    out_type: Any,
    scratch_types: Any,
    num_blocks: int,
    interpret: Any,
) -> Callable:
    """A kernel of `num_blocks` blocks, each of COMPUTE warpgroups that multiply and one more."""
    compiler_params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        approx_math=True,
    )
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(num_blocks,),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params,
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
    """A kernel whose body calls `multiply_tiles`.

    Args:
        body: takes references to operands, results, `buffers` and the barriers full and empty.
        out_type: shapes and types of the results.
        blocks: how the output is cut.
        interpret: JAX's parameters of interpretation, or False.
        buffers: shared memory of a block.
        copies: number of copies that bring the operands of a step.
    """
    # A stage is full once all operands of its step have come.
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=blocks.stages)
    # It is empty once both warpgroups are done with them.
    empty = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=blocks.stages)
    scratch_types = (*buffers, full, empty)
    num_blocks = 2 if interpret else NUM_SMS
    return make_kernel(body, out_type, scratch_types, num_blocks, interpret)


def multiply_tiles(
    num_tiles,
    blocks,
    full,
    empty,
    *,
    tile_at,
    fetch,
    is_needed,
    multiply,
    finish,
    products=1,
):
    """Computes tiles of the output one after the other.

    The fetching warpgroup runs ahead: it copies the operands of the next tile while the others
    still store the last one.

    Args:
        num_tiles: number of tiles of all blocks; a block takes every `num_blocks`-th.
        blocks: how the output is cut.
        full, empty: the barriers of `make_matmul`, one a stage.
        tile_at: number -> tile, a tuple whose last item is the number of steps of its contraction.
        fetch: (tile, step, slot): starts the copies of a step's operands to a stage.
        is_needed: tile -> whether this warpgroup has a product to compute. If not, it leaves the
            tensor cores to the other.
        multiply: (accumulator, slot, tile, step): adds one step's product.
        finish: (tile, product): stores the result.
        products: number of wgmmas that `multiply` starts.
    """
    stages = _Stages(full, empty, blocks.stages)
    first, stride = lax.axis_index("sm"), lax.axis_size("sm")
    num_mine = lax.div(num_tiles - first + stride - 1, stride)

    def my_tile(i):
        return tile_at(first + i * stride)

    @pl.when(lax.axis_index("warpgroup") == COMPUTE)
    def _():
        _fetch_tiles(num_mine, my_tile, fetch, stages)

    @pl.when(lax.axis_index("warpgroup") < COMPUTE)
    def _():
        plgpu.set_max_registers(232, action="increase")
        accumulator = plgpu.ACC((ROWS, blocks.columns), jnp.float32)

        def compute_tile(i, count):
            tile = my_tile(i)

            def add_step(accumulator, slot, step):
                multiply(accumulator, slot, tile, step)
                # This step's products run on. Those of the step before must have ended.
                plgpu.wgmma_wait(products)

            num_steps = jnp.where(is_needed(tile), tile[-1], 0)
            accumulate = functools.partial(_accumulate, add_step, num_steps, stages, count)
            product = pl.run_scoped(accumulate, accumulator)
            pl.when(is_needed(tile))(lambda: finish(tile, product))
            # A warpgroup without a product still hands the stages back.
            lax.fori_loop(num_steps, tile[-1], functools.partial(skip_step, count), None)
            return count + tile[-1]

        def skip_step(count, step, _):
            stages.wait_until_full(count + step)
            stages.release(count + step)

        lax.fori_loop(0, num_mine, compute_tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


class _Stages(NamedTuple):
    """The ring of stages through which the operands of steps go.

    Steps are counted over all tiles of a block.
    """

    full: Any
    empty: Any
    num: int

    def wait_until_empty(self, count):
        """The slot of a step, once both warpgroups are done with what it held before."""
        slot = lax.rem(count, self.num)
        wait_if(count >= self.num, self.empty, slot)
        return slot

    def wait_until_full(self, count):
        """The slot of a step, once its operands have come."""
        slot = lax.rem(count, self.num)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, count):
        """Tells the fetching warpgroup that this one is done with a step."""
        plgpu.barrier_arrive(self.empty.at[lax.rem(count, self.num)])


def _fetch_tiles(num_mine, my_tile, fetch, stages):
    """Copies the operands of all steps of a block's tiles, as far ahead as there are stages."""
    # The other warpgroups take the registers that this one gives back.
    plgpu.set_max_registers(40, action="decrease")

    def fetch_tile(i, count):
        tile = my_tile(i)

        def fetch_step(step, count):
            slot = stages.wait_until_empty(count)
            fetch(tile, step, slot)
            return count + 1

        return lax.fori_loop(0, tile[-1], fetch_step, count)

    count = lax.fori_loop(0, num_mine, fetch_tile, jnp.int32(0))
    drain((stages.empty,), count, stages.num)


def _accumulate(add_step, num_steps, stages, count, accumulator):
    """The sum of a tile's steps; `count` steps were taken before it."""

    def step(k, count):
        slot = stages.wait_until_full(count)
        add_step(accumulator, slot, k)
        # The step before has ended, so its stage can be filled again.
        pl.when(k > 0)(lambda: stages.release(count - 1))
        return count + 1

    lax.fori_loop(0, num_steps, step, count)
    plgpu.wgmma_wait(0)
    pl.when(num_steps > 0)(lambda: stages.release(count + num_steps - 1))
    return accumulator[...]


def wait_if(condition: Any, barrier: Any, slot: Any = None) -> None:
    """Waits for a barrier, or one slot of it, where the condition holds."""

    @pl.when(condition)
    def _():
        # The slot is taken here, so that a constant one stays a constant in the kernel.
        plgpu.barrier_wait(barrier if slot is None else barrier.at[slot])


def drain(barriers: tuple[Any, ...], count: Any, num_slots: int) -> None:
    """Waits for the last arrival at each slot of barriers that were used `count` times in turn.

    A kernel may end, and free its barriers, only when every arrival has been waited for.
    """
    for slot in range(num_slots):
        for barrier in barriers:
            wait_if(count > slot, barrier, slot)


def store(product, buffers, target, row, column):
    """Stores a warpgroup's product [ROWS, columns] piece by piece."""
    for number in range(product.shape[1] // PIECE):
        first = number * PIECE
        piece = product[:, first : first + PIECE]
        store_piece(piece, number, buffers, target, row, column + first)


def store_piece(values, number, buffers, target, row, column):
    """Stores the tile's `number`-th piece [ROWS, PIECE].

    Two buffers alternate, so that one is written while the other is still being copied.
    """

    @pl.when((row < target.shape[0]) & (column < target.shape[1]))
    def _():
        # Wait until the buffer is free: one copy may be on its way, but at a tile's first piece
        # none, because the tile before may have ended with either buffer.
        num_running = min(number, 1)
        plgpu.wait_smem_to_gmem(num_running, wait_read_only=True)
        slot = number % 2
        buffers[slot] = values.astype(target.dtype)
        plgpu.commit_smem()
        place = target.at[pl.ds(row, ROWS), pl.ds(column, PIECE)]
        plgpu.copy_smem_to_gmem(buffers.at[slot], place)
