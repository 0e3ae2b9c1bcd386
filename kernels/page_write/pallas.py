"""Writing to pages for Hopper GPUs, as a Pallas kernel for Mosaic GPU.

A block copies the keys and values of a few tokens to shared memory at once, and from there each
token's to its slot, 2 KiB a copy in a model of 8 heads of 128 in bfloat16. XLA's scatter writes
number by number, and keys apart from values.
"""

import functools
import math
from typing import Any

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TOKENS = 8  # of a block
MOST_BYTES = 8 * 1024  # of a token's keys, so that a block's tokens fit shared memory


# jit: the kernel is lowered once for all layers.
@functools.partial(jax.jit, static_argnames=("interpret",))
def page_write(
    pages: tuple[Array, Array],
    new: tuple[Array, Array],
    slots: Array,
    *,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """As `api.page_write`."""
    num_tokens, *token_shape = new[0].shape
    page_size = pages[0].shape[1]
    size = math.gcd(num_tokens, TOKENS)

    def body(k, v, slots, k_pages, v_pages):
        first = lax.axis_index("block") * size

        def write(k_smem, v_smem, full):
            for source, buffer in ((k, k_smem), (v, v_smem)):
                plgpu.copy_gmem_to_smem(source.at[pl.ds(first, size)], buffer, full)
            plgpu.barrier_wait(full)
            for token in range(size):
                slot = slots[first + token]
                place = lax.div(slot, page_size), lax.rem(slot, page_size)
                for buffer, target in ((k_smem, k_pages), (v_smem, v_pages)):
                    plgpu.copy_smem_to_gmem(buffer.at[token], target.at[place])
            plgpu.wait_smem_to_gmem(0)

        buffer = plgpu.SMEM((size, *token_shape), new[0].dtype)
        pl.run_scoped(write, buffer, buffer, plgpu.Barrier(num_arrivals=2))

    kernel = pl.kernel(
        body,
        mesh=plgpu.Mesh(grid=(num_tokens // size,), grid_names=("block",)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    # References, because only what is one is written in place.
    references = tuple(jax.new_ref(each) for each in pages)
    kernel(*new, slots, *references)
    return tuple(jax.freeze(each) for each in references)
