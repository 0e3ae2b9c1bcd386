"""Grouped matmuls with `gate` and `up` that end in SwiGLU, as a Pallas kernel for Mosaic GPU.

Source: Shazeer 2020 (arXiv 2002.05202), equation 6: h = silu(g) * u of g = x W_gate and u = x W_up.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.grouped_matmul.pallas import RowTiles, cover, out_buffers
from jaxscale.kernels.persistent import (
    DEPTH,
    NUM_SMS,
    PIECE,
    ROWS,
    TILE_ROWS,
    BlockSizes,
    make_matmul,
    multiply_tiles,
    part,
    swizzled,
)

STATIC = ("is_for_backward", "needs_tail", "blocks", "interpret")
# Of `backward_of_some`:
THREADS = 128  # of a warpgroup, which is a block
CHUNK = 2048  # elements that a block has at a time, so that they fit its registers
BLOCKS = 4  # of a multiprocessor
STAGES = 2  # chunks of a block that are on their way or in work
# The index that jax 0.10 wants beside a reference, and of which later ones warn.
ALL = () if jax.__version_info__ >= (0, 11) else (...,)


@functools.partial(jax.jit, static_argnames=STATIC)
def forward(
    rows: Array,
    gate: Array,
    up: Array,
    group_sizes: Array,
    *,
    is_for_backward: bool,
    needs_tail: bool = True,
    blocks: BlockSizes,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """h = silu(g) * u of the products g and u, after these are rounded.

    Args:
        rows: [rows, D].
        gate, up: [E, D, F].
        group_sizes: [E] int32.
        is_for_backward: whether g and u are needed too.
        needs_tail: as in `api.feed_forward`.
    Returns:
        (h,) or (h, g, u), [rows, F] each.
    """
    num_rows, depth = rows.shape
    num_groups, _, width = gate.shape
    table = cover(group_sizes, num_rows, needs_tail)
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


def backward(g: Array, u: Array, dh: Array) -> tuple[Array, Array, Array]:
    """(h, dg, du): the result again, and its gradients given the cotangent."""
    h, pullback = jax.vjp(swiglu, g, u)
    return h, *pullback(dh)


@functools.partial(jax.jit, static_argnames="interpret")
def backward_of_some(
    g: Array,
    u: Array,
    dh: Array,
    num_used: Array,
    *,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """`backward` of the first rows, as a kernel that spends nothing on the others.

    A block is one warpgroup, which copies CHUNK elements at a time into shared memory, STAGES
    chunks ahead.

    Args:
        g, u, dh: [rows, F], with F a multiple of 64 and the rows of 8.
        num_used: of rows; the tile of rows after them is taken too, the others are undefined.
    Returns:
        (h, dg, du), [rows, F] each.
    """
    chunk = math.gcd(g.size, CHUNK)
    shape = (chunk // THREADS, THREADS)
    all_chunks = g.size // chunk
    # In units of 64 elements, whose number does not overflow.
    units = jnp.minimum(num_used + TILE_ROWS, len(g)) * (g.shape[1] // 64)
    num_chunks = -(-units // (chunk // 64)).reshape(1).astype(jnp.int32)
    num_blocks = min(all_chunks, 2 if interpret else NUM_SMS * BLOCKS)
    vector = next(n for n in (8, 4, 2, 1) if chunk % (THREADS * n) == 0)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=vector)

    def body(num_gmem, *refs):
        sources, targets, (chunk_smem, full) = refs[:3], refs[3:6], refs[6:]
        block = lax.axis_index("block")
        num_mine = lax.div(num_gmem[0] - block + num_blocks - 1, num_blocks)

        def fetch(i):
            slot = lax.rem(i, STAGES)

            @pl.when(i < num_mine)
            def _():
                for number, source in enumerate(sources):
                    of_block = source.at[block + i * num_blocks]
                    plgpu.copy_gmem_to_smem(of_block, chunk_smem.at[slot, number], full.at[slot])

        def load(slot, number):
            chunk = chunk_smem.at[slot, number]
            values = plgpu.load(chunk, *ALL, layout=layout, optimized=False)
            return values.astype(jnp.float32)

        def compute(i, _):
            slot = lax.rem(i, STAGES)
            plgpu.barrier_wait(full.at[slot])
            g, u, dh = (load(slot, number) for number in range(3))
            # All threads must have read the chunk before another takes its place.
            plgpu.commit_smem()
            fetch(i + STAGES)
            share = jax.nn.sigmoid(g)
            silu = g * share
            slope = share + silu * (1 - share)
            for values, target in zip((silu * u, dh * u * slope, dh * silu), targets, strict=True):
                target[block + i * num_blocks] = values.astype(target.dtype)
            return _

        for i in range(STAGES):
            fetch(jnp.int32(i))
        lax.fori_loop(0, num_mine, compute, None)

    out_type = jax.ShapeDtypeStruct((all_chunks, *shape), g.dtype)
    kernel = plgpu.kernel(
        body,
        out_type=(out_type,) * 3,
        scratch_types=(
            plgpu.SMEM((STAGES, 3, *shape), g.dtype),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        ),
        grid=(num_blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=True,
        ),
        interpret=interpret,
    )
    results = kernel(num_chunks, *(x.reshape(all_chunks, *shape) for x in (g, u, dh)))
    return tuple(x.reshape(g.shape) for x in results)
