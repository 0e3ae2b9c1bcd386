"""Grouped matmuls with `gate` and `up` whose tiles end in SwiGLU, as a Pallas kernel for Mosaic GPU.

Source: Shazeer 2020 (arXiv 2002.05202), equation 6: h = silu(g) * u of g = x W_gate and u = x W_up.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.grouped_matmul.pallas import RowTiles, out_buffers, row_tiles
from jaxscale.kernels.persistent import (
    COMPUTE,
    DEPTH,
    PIECE,
    ROWS,
    SWIZZLED,
    BlockSizes,
    make_matmul,
    multiply_tiles,
)


@functools.partial(jax.jit, static_argnames=("is_for_backward", "blocks", "interpret"))
def forward(
    rows: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    group_sizes: jax.Array,
    *,
    is_for_backward: bool,
    blocks: BlockSizes,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """(h,) or (h, g, u) [rows, F] of rows [rows, D], gate and up [E, D, F]; h is that of the rounded g and u."""
    num_rows, depth = rows.shape
    num_groups, _, width = gate.shape
    table = row_tiles(group_sizes, num_rows)
    half = blocks.columns // 2  # of a tile's columns are the gate's
    num_columns = pl.cdiv(width, half)
    num_out = 3 if is_for_backward else 1

    def body(table_gmem, rows_gmem, gate_gmem, up_gmem, *refs):
        targets, (rows_smem, both_smem, out_smem, edge_smem, full, empty) = (
            refs[:num_out],
            refs[num_out:],
        )
        warpgroup = lax.axis_index("warpgroup")
        tiles = RowTiles(table_gmem, num_groups, num_columns, half, depth // DEPTH, blocks)

        def fetch(tile, step, slot):
            group, first, _, _, column, _ = tile
            depth_slice, columns = pl.ds(step * DEPTH, DEPTH), pl.ds(column, half)
            left = rows_gmem.at[pl.ds(first, COMPUTE * ROWS), depth_slice]
            plgpu.copy_gmem_to_smem(left, rows_smem.at[slot], full.at[slot])
            for number, weights in enumerate((gate_gmem, up_gmem)):
                right = both_smem.at[slot, number]
                plgpu.copy_gmem_to_smem(
                    weights.at[group, depth_slice, columns], right, full.at[slot]
                )

        def multiply(accumulator, slot, tile, step):
            left = rows_smem.at[slot, pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)]
            for number in range(2):
                plgpu.wgmma(
                    accumulator.at[:, pl.ds(number * half, half)], left, both_smem.at[slot, number]
                )

        def finish(tile, product):
            for start in range(0, half, PIECE):
                g, u = (product[:, c : c + PIECE].astype(rows.dtype) for c in (start, half + start))
                for number, (values, target) in enumerate(
                    zip((swiglu(g, u), g, u), targets, strict=False)
                ):
                    tiles.store_piece(
                        tile,
                        values,
                        start // PIECE * num_out + number,
                        out_smem.at[warpgroup],
                        edge_smem.at[warpgroup],
                        target,
                        start,
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
            products=2,
        )

    kernel = make_matmul(
        body,
        (jax.ShapeDtypeStruct((num_rows, width), rows.dtype),) * num_out,
        blocks,
        interpret,
        plgpu.SMEM((blocks.stages, COMPUTE * ROWS, DEPTH), rows.dtype, transforms=SWIZZLED),
        plgpu.SMEM((blocks.stages, 2, DEPTH, half), rows.dtype, transforms=SWIZZLED),
        *out_buffers(rows.dtype),
        copies=3,
    )
    return kernel(table, rows, gate, up)


def swiglu(g: jax.Array, u: jax.Array) -> jax.Array:
    """silu(g) * u in float32 inside."""
    wide = g.astype(jnp.float32)
    return (jax.nn.silu(wide) * u.astype(jnp.float32)).astype(g.dtype)
