"""The backward of RMSNorm for Hopper GPUs, as a Pallas kernel for Mosaic GPU.

A block is one warpgroup, which holds one row at a time in its registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.persistent import NUM_SMS

THREADS = 128  # of a warpgroup, which is a block
MAX_WIDTH = 4096  # elements of a row, beyond which a thread's part does not fit its registers
BLOCKS = 4  # of a multiprocessor: while one sums its row, the rows of others are on their way
STAGES = 2  # rows of a block that are on their way or in work


@functools.partial(jax.jit, static_argnames=("epsilon", "interpret"))
def backward(
    x: Array,
    scale: Array,
    dx: Array,
    dy: Array,
    *,
    epsilon: float,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Gradients of `x` and `scale` for y = x r scale with r = (mean x^2 + epsilon)^-1/2.

    Args:
        x: [rows, D].
        scale: [D].
        dx: [rows, D] the other gradient of `x`, which is added.
        dy: [rows, D].
    Returns:
        ([rows, D] in the type of `x`, [D] float32).
    """
    num_rows, width = x.shape
    num_blocks = min(num_rows, 2 if interpret else NUM_SMS * BLOCKS)
    # A copy takes at most 256 elements of a dim, so a row is divided into two dims.
    row_shape = (width // THREADS, THREADS)
    # Each thread loads as many neighbouring elements at a time as divide its part of a row.
    vector = next(n for n in (8, 4, 2, 1) if width % (THREADS * n) == 0)
    layout = plgpu.Layout.WG_STRIDED(row_shape, vec_size=vector)

    def load(ref):
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def body(
        x_gmem,
        scale_gmem,
        dx_gmem,
        dy_gmem,
        out_gmem,
        dscale_gmem,
        row_smem,
        full,
    ):
        block = lax.axis_index("block")
        num_mine = lax.div(num_rows - block + num_blocks - 1, num_blocks)
        scale = load(scale_gmem)

        def fetch(i):
            slot = lax.rem(i, STAGES)

            @pl.when(i < num_mine)
            def _():
                for number, source in enumerate((x_gmem, dx_gmem, dy_gmem)):
                    row = source.at[block + i * num_blocks]
                    plgpu.copy_gmem_to_smem(row, row_smem.at[slot, number], full.at[slot])

        def add_row(i, dscale):
            slot = lax.rem(i, STAGES)
            plgpu.barrier_wait(full.at[slot])
            x, dx, dy = (load(row_smem.at[slot, number]) for number in range(3))
            # All threads must have read the row before another takes its place.
            plgpu.commit_smem()
            fetch(i + STAGES)
            dnormal = dy * scale
            # Both sums are of what was loaded, so that neither waits for the other.
            square = jnp.sum(x * x)
            slope = jnp.sum(dnormal * x)
            inverse = lax.rsqrt(square * (1 / width) + epsilon)
            of_inverse = slope * (inverse * inverse * (1 / width)) * x
            out = dx + inverse * (dnormal - of_inverse)
            out_gmem[block + i * num_blocks] = out.astype(out_gmem.dtype)
            return dscale + dy * x * inverse

        for i in range(STAGES):
            fetch(jnp.int32(i))
        zeros = plgpu.layout_cast(jnp.zeros(row_shape, jnp.float32), layout)
        dscale_gmem[block] = lax.fori_loop(0, num_mine, add_row, zeros)

    out_type = jax.ShapeDtypeStruct((num_rows, *row_shape), x.dtype)
    dscale_type = jax.ShapeDtypeStruct((num_blocks, *row_shape), jnp.float32)
    rows = plgpu.SMEM((STAGES, 3, *row_shape), x.dtype)
    full = plgpu.Barrier(num_arrivals=3, num_barriers=STAGES)
    compiler_params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        approx_math=True,
    )
    kernel = plgpu.kernel(
        body,
        out_type=(out_type, dscale_type),
        scratch_types=(rows, full),
        grid=(num_blocks,),
        grid_names=("block",),
        compiler_params=compiler_params,
        interpret=interpret,
    )
    x, dx, dy = (each.reshape(num_rows, *row_shape) for each in (x, dx, dy))
    out, dscale = kernel(x, scale.reshape(row_shape), dx, dy)
    return out.reshape(num_rows, width), dscale.sum(0).reshape(width)
