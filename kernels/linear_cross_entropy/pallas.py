"""Exponentials of logits for Hopper GPUs, as a Pallas kernel for Mosaic GPU: the head's matmul and what follows it."""

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
    LOG2E,
    PIECE,
    ROWS,
    SWIZZLED,
    BlockSizes,
    make_matmul,
    multiply_tiles,
    store,
)

UNITS = 8, DEPTH  # rows and columns of a swizzled tile


@functools.partial(jax.jit, static_argnames=("blocks", "interpret"))
def exponentials(
    h: jax.Array, head: jax.Array, *, blocks: BlockSizes, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each logit's exponential beside the largest of its tile, which keeps a bfloat16 of it as exact as any bfloat16.

    Args:
        h: [T, D].
        head: [V, D].
    Returns:
        exp(logit - top) [T, V rounded up to PIECE] in the type of `h`, 0 beyond V; of each tile of
        columns the largest logit `top` [tiles, T] and the sum of its exponentials [tiles, T],
        float32.
    """
    num_tokens, vocabulary = h.shape[0], head.shape[0]
    # Copies want whole swizzled tiles; `head` is copied for that only where D or V is odd.
    h, head = (
        jnp.pad(x, [(0, -size % unit) for size, unit in zip(x.shape, UNITS, strict=True)])
        for x in (h, head)
    )
    length, depth = h.shape
    tile_rows = COMPUTE * ROWS
    num_tiles, num_columns = pl.cdiv(length, tile_rows), pl.cdiv(vocabulary, blocks.columns)
    steps = pl.cdiv(depth, DEPTH)

    def body(
        h_gmem,
        head_gmem,
        out_gmem,
        top_gmem,
        sum_gmem,
        h_smem,
        head_smem,
        out_smem,
        row_smem,
        full,
        empty,
    ):
        warpgroup = lax.axis_index("warpgroup")

        def tile_at(number):
            i, j = plgpu.planar_snake(number, (num_tiles, num_columns), blocks.minor, blocks.snake)
            return i * tile_rows, j, jnp.int32(steps)

        def fetch(tile, step, slot):
            row, j, _ = tile
            depth_slice = pl.ds(step * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(
                h_gmem.at[pl.ds(row, tile_rows), depth_slice], h_smem.at[slot], full.at[slot]
            )
            columns = pl.ds(j * blocks.columns, blocks.columns)
            plgpu.copy_gmem_to_smem(
                head_gmem.at[columns, depth_slice], head_smem.at[slot], full.at[slot]
            )

        def multiply(accumulator, slot, tile, step):
            left = h_smem.at[slot, pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)]
            plgpu.wgmma(accumulator, left, head_smem.at[slot].transpose((1, 0)))

        def finish(tile, logits):
            row, j, _ = tile
            row += warpgroup * ROWS
            if vocabulary % blocks.columns:
                column = plgpu.broadcasted_iota(
                    jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA
                )
                logits = jnp.where(column < vocabulary - j * blocks.columns, logits, -jnp.inf)
            top = logits.max(axis=1) * LOG2E
            values = jnp.exp2(logits * LOG2E - lax.broadcast_in_dim(top, logits.shape, [0]))
            sums = values.sum(axis=1)
            store(values, out_smem.at[warpgroup], out_gmem, row, j * blocks.columns)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            row_smem[warpgroup, 0] = top * (1 / LOG2E)
            row_smem[warpgroup, 1] = sums
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(row_smem.at[warpgroup, 0], top_gmem.at[j, pl.ds(row, ROWS)])
            plgpu.copy_smem_to_gmem(row_smem.at[warpgroup, 1], sum_gmem.at[j, pl.ds(row, ROWS)])

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

    by_row = jax.ShapeDtypeStruct((num_columns, num_tiles * tile_rows), jnp.float32)
    kernel = make_matmul(
        body,
        (
            jax.ShapeDtypeStruct((length, pl.cdiv(vocabulary, PIECE) * PIECE), h.dtype),
            by_row,
            by_row,
        ),
        blocks,
        interpret,
        plgpu.SMEM((blocks.stages, tile_rows, DEPTH), h.dtype, transforms=SWIZZLED),
        plgpu.SMEM((blocks.stages, blocks.columns, DEPTH), h.dtype, transforms=SWIZZLED),
        plgpu.SMEM((COMPUTE, 2, ROWS, PIECE), h.dtype, transforms=SWIZZLED),
        plgpu.SMEM((COMPUTE, 2, ROWS), jnp.float32),
    )
    values, tops, sums = kernel(h, head)
    return values[:num_tokens], tops[:, :num_tokens], sums[:, :num_tokens]
