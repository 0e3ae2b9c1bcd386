"""Exponentials of logits for Hopper GPUs, as a Pallas kernel for Mosaic GPU.

The kernel is the head's matmul, whose tiles end in the exponentials.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.persistent import (
    COMPUTE,
    DEPTH,
    LOG2E,
    PIECE,
    ROWS,
    TILE_ROWS,
    BlockSizes,
    make_matmul,
    multiply_tiles,
    pad_to_units,
    part,
    store,
    swizzled,
)

UNITS = 8, DEPTH  # rows and columns of a swizzled tile


@functools.partial(jax.jit, static_argnames=("blocks", "interpret"))
def exponentials(
    h: Array,
    head: Array,
    *,
    blocks: BlockSizes,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """The exponential of each logit minus the largest of its tile.

    It is at most 1, so that in bfloat16 it is as exact as any bfloat16.

    Args:
        h: [T, D].
        head: [V, D].
    Returns:
        (exp(logit - top) [T, V rounded up to PIECE] in the type of `h`, 0 beyond V;
        top [tiles, T], the largest logit of each tile of columns, float32; where it is -inf, the
        exponentials are 0;
        the sum of its exponentials [tiles, T], float32).
    """
    num_tokens, vocabulary = h.shape[0], head.shape[0]
    # Copies want whole swizzled tiles. Only where D or V is odd does this copy `head`.
    h, head = pad_to_units(h, UNITS), pad_to_units(head, UNITS)
    length, depth = h.shape
    num_tiles = pl.cdiv(length, TILE_ROWS)
    num_columns = pl.cdiv(vocabulary, blocks.columns)
    steps = pl.cdiv(depth, DEPTH)

    def body(*refs):
        h_gmem, head_gmem, out_gmem, top_gmem, sum_gmem, *scratch = refs
        h_smem, head_smem, out_smem, row_smem, full, empty = scratch
        warpgroup = lax.axis_index("warpgroup")

        def tile_at(number):
            i, j = blocks.place(number, (num_tiles, num_columns))
            return i * TILE_ROWS, j, jnp.int32(steps)

        def fetch(tile, step, slot):
            row, j, _ = tile
            depth_slice = pl.ds(step * DEPTH, DEPTH)
            left = h_gmem.at[pl.ds(row, TILE_ROWS), depth_slice]
            plgpu.copy_gmem_to_smem(left, h_smem.at[slot], full.at[slot])
            columns = pl.ds(j * blocks.columns, blocks.columns)
            right = head_gmem.at[columns, depth_slice]
            plgpu.copy_gmem_to_smem(right, head_smem.at[slot], full.at[slot])

        def multiply(accumulator, slot, tile, step):
            mine = part(warpgroup, ROWS)
            right = head_smem.at[slot].transpose((1, 0))
            plgpu.wgmma(accumulator, h_smem.at[slot, mine], right)

        def finish(tile, logits):
            row, j, _ = tile
            row += warpgroup * ROWS
            if vocabulary % blocks.columns:
                # Columns of the last tile that lie beyond the vocabulary.
                layout = plgpu.Layout.WGMMA
                column = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=layout)
                is_known = column < vocabulary - j * blocks.columns
                logits = jnp.where(is_known, logits, -jnp.inf)
            top = logits.max(axis=1) * LOG2E
            # A tile of forbidden words leaves -inf, and -inf - -inf would be NaN.
            safe = jnp.where(top == -jnp.inf, 0.0, top)
            top_of_column = lax.broadcast_in_dim(safe, logits.shape, [0])
            values = jnp.exp2(logits * LOG2E - top_of_column)
            sums = values.sum(axis=1)
            store(values, out_smem.at[warpgroup], out_gmem, row, j * blocks.columns)
            # The copies of the tile before may still read these rows.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            row_smem[warpgroup, 0] = top * (1 / LOG2E)
            row_smem[warpgroup, 1] = sums
            plgpu.commit_smem()
            rows = pl.ds(row, ROWS)
            for number, target in enumerate((top_gmem, sum_gmem)):
                values = row_smem.at[warpgroup, number]
                plgpu.copy_smem_to_gmem(values, target.at[j, rows])

        multiply_tiles(
            num_tiles * num_columns,
            blocks,
            full,
            empty,
            tile_at=tile_at,
            fetch=fetch,
            is_needed=lambda tile: True,
            multiply=multiply,
            finish=finish,
        )

    width = pl.cdiv(vocabulary, PIECE) * PIECE
    values_type = jax.ShapeDtypeStruct((length, width), h.dtype)
    by_row = jax.ShapeDtypeStruct((num_columns, num_tiles * TILE_ROWS), jnp.float32)
    kernel = make_matmul(
        body,
        (values_type, by_row, by_row),
        blocks,
        interpret,
        swizzled((blocks.stages, TILE_ROWS, DEPTH), h.dtype),
        swizzled((blocks.stages, blocks.columns, DEPTH), h.dtype),
        swizzled((COMPUTE, 2, ROWS, PIECE), h.dtype),
        plgpu.SMEM((COMPUTE, 2, ROWS), jnp.float32),
    )
    values, tops, sums = kernel(h, head)
    values = values[:num_tokens]
    tops = tops[:, :num_tokens]
    return values, tops, sums[:, :num_tokens]
