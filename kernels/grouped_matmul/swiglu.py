"""Grouped matmuls with `gate` and `up` that end in SwiGLU, as a Pallas kernel for Mosaic GPU.

Source: Shazeer 2020 (arXiv 2002.05202), equation 6: h = silu(g) * u of g = x W_gate and u = x W_up.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.grouped_matmul.pallas import ALIGNMENT, RowTiles, out_buffers
from jaxscale.kernels.grouped_matmul.tiles import row_tiles
from jaxscale.kernels.persistent import (
    DEPTH,
    PIECE,
    ROWS,
    TILE_ROWS,
    BlockSizes,
    make_matmul,
    multiply_tiles,
    part,
    swizzled,
)


@functools.partial(jax.jit, static_argnames=("is_for_backward", "blocks", "interpret"))
def forward(
    rows: Array,
    gate: Array,
    up: Array,
    group_sizes: Array,
    *,
    is_for_backward: bool,
    blocks: BlockSizes,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """h = silu(g) * u of the products g and u, after these are rounded.

    Args:
        rows: [rows, D].
        gate, up: [E, D, F].
        group_sizes: [E] int32.
        is_for_backward: whether g and u are needed too.
    Returns:
        (h,) or (h, g, u), [rows, F] each.
    """
    num_rows, depth = rows.shape
    num_groups, _, width = gate.shape
    table = row_tiles(group_sizes, num_rows, tile=TILE_ROWS, alignment=ALIGNMENT)
    # The left half of a tile's columns is the gate's product, the right half that of `up`.
    half = blocks.columns // 2
    num_columns = pl.cdiv(width, half)
    num_out = 3 if is_for_backward else 1

    def body(table_gmem, rows_gmem, gate_gmem, up_gmem, *refs):
        targets, scratch = refs[:num_out], refs[num_out:]
        rows_smem, both_smem, out_smem, edge_smem, full, empty = scratch
        warpgroup = lax.axis_index("warpgroup")
        tiles = RowTiles(table_gmem, num_groups, num_columns, half, depth // DEPTH, blocks)

        def fetch(tile, step, slot):
            group, first, _, _, column, _ = tile
            depth_slice, columns = pl.ds(step * DEPTH, DEPTH), pl.ds(column, half)
            left = rows_gmem.at[pl.ds(first, TILE_ROWS), depth_slice]
            plgpu.copy_gmem_to_smem(left, rows_smem.at[slot], full.at[slot])
            for number, weights in enumerate((gate_gmem, up_gmem)):
                source = weights.at[group, depth_slice, columns]
                target = both_smem.at[slot, number]
                plgpu.copy_gmem_to_smem(source, target, full.at[slot])

        def multiply(accumulator, slot, tile, step):
            mine = part(warpgroup, ROWS)
            left = rows_smem.at[slot, mine]
            for number in range(2):
                columns = pl.ds(number * half, half)
                plgpu.wgmma(accumulator.at[:, columns], left, both_smem.at[slot, number])

        def finish(tile, product):
            buffers, edge = out_smem.at[warpgroup], edge_smem.at[warpgroup]
            for start in range(0, half, PIECE):
                g = product[:, start : start + PIECE].astype(rows.dtype)
                u = product[:, half + start : half + start + PIECE].astype(rows.dtype)
                results = swiglu(g, u), g, u
                # The buffers alternate over all pieces of all results.
                number = start // PIECE * num_out
                for values, target in zip(results, targets, strict=False):
                    tiles.store_piece(tile, values, number, buffers, edge, target, start)
                    number += 1

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
        swizzled((blocks.stages, TILE_ROWS, DEPTH), rows.dtype),
        swizzled((blocks.stages, 2, DEPTH, half), rows.dtype),
        *out_buffers(rows.dtype),
        copies=3,
    )
    return kernel(table, rows, gate, up)


def swiglu(g: Array, u: Array) -> Array:
    """silu(g) * u, in float32 inside."""
    g_wide = g.astype(jnp.float32)
    h = jax.nn.silu(g_wide) * u.astype(jnp.float32)
    return h.astype(g.dtype)
