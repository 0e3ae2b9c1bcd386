"""The backward of RMSNorm for Hopper GPUs, as a Pallas kernel for Mosaic GPU: a row at a time in registers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.persistent import NUM_SMS

THREADS = 128  # of a warpgroup, which is a block
MAX_WIDTH = 4096  # of a row, beyond which a thread's part of it does not fit its registers
BLOCKS = 4  # of a multiprocessor: while one adds up its row, those of others are on their way
STAGES = 2  # rows on their way to a block or in its work


@functools.partial(jax.jit, static_argnames=("epsilon", "interpret"))
def backward(
    x: jax.Array,
    scale: jax.Array,
    dx: jax.Array,
    dy: jax.Array,
    *,
    epsilon: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `x` and, in float32, of `scale`, for y = x r scale with r = (mean x^2 + epsilon)^-1/2.

    Args:
        x: [rows, D].
        scale: [D].
        dx: [rows, D] the other gradient of `x`, which is added.
        dy: [rows, D].
    """
    num_rows, width = x.shape
    num_blocks = min(num_rows, 2 if interpret else NUM_SMS * BLOCKS)
    row_shape = (width // THREADS, THREADS)  # a copy takes at most 256 elements of a dim
    vector = next(n for n in (8, 4, 2, 1) if width % (THREADS * n) == 0)
    layout = plgpu.Layout.WG_STRIDED(row_shape, vec_size=vector)

    def load(ref):
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def body(x_gmem, scale_gmem, dx_gmem, dy_gmem, out_gmem, dscale_gmem, row_smem, full):
        block = lax.axis_index("block")
        num_mine = lax.div(num_rows - block + num_blocks - 1, num_blocks)
        scale = load(scale_gmem)

        def fetch(i):
            slot = lax.rem(i, STAGES)

            @pl.when(i < num_mine)
            def _():
                for number, source in enumerate((x_gmem, dx_gmem, dy_gmem)):
                    target = row_smem.at[slot, number]
                    plgpu.copy_gmem_to_smem(
                        source.at[block + i * num_blocks], target, full.at[slot]
                    )

        def one(i, dscale):
            slot = lax.rem(i, STAGES)
            plgpu.barrier_wait(full.at[slot])
            x, dx, dy = (load(row_smem.at[slot, number]) for number in range(3))
            plgpu.commit_smem()  # all threads have read the row before another takes its place
            fetch(i + STAGES)
            dnormal = dy * scale
            # Both sums are of what was loaded, so that neither waits for the other.
            square, slope = jnp.sum(x * x), jnp.sum(dnormal * x)
            inverse = lax.rsqrt(square * (1 / width) + epsilon)
            out = dx + inverse * (dnormal - slope * (inverse * inverse * (1 / width)) * x)
            out_gmem[block + i * num_blocks] = out.astype(out_gmem.dtype)
            return dscale + dy * x * inverse

        for i in range(STAGES):
            fetch(jnp.int32(i))
        zeros = plgpu.layout_cast(jnp.zeros(row_shape, jnp.float32), layout)
        dscale_gmem[block] = lax.fori_loop(0, num_mine, one, zeros)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((num_rows, *row_shape), x.dtype),
            jax.ShapeDtypeStruct((num_blocks, *row_shape), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((STAGES, 3, *row_shape), x.dtype),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        ),
        grid=(num_blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True
        ),
        interpret=interpret,
    )
    x, dx, dy = (each.reshape(num_rows, *row_shape) for each in (x, dx, dy))
    out, dscale = kernel(x, scale.reshape(row_shape), dx, dy)
    return out.reshape(num_rows, width), dscale.sum(0).reshape(width)
