"""The kernel of `pallas` for up to 32 tokens, whose inputs do not fit a block's memory as a whole.

A block is one warpgroup, which computes 64 outputs over a part of the inputs; the parts are added
up afterwards, by XLA. The integers are the left operand of warpgroups' products, whose columns are
the tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax._src.lib.mlir import ir
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.products import MATRIX
from jaxscale.kernels.persistent import NUM_SMS, swizzled
from jaxscale.kernels.quantised_matmul.packing import INPUTS, OUTPUTS, unpack_unit
from jaxscale.kernels.quantised_matmul.pallas import Steps, at_its_tile
from jaxscale.kernels.quantised_matmul.tensor_cores import (
    LAYOUT,
    UNIT,
    of_registers,
    operands_of,
)

BLOCKS = 4  # that a multiprocessor has room for


# jit: the kernel is lowered once for all layers.
@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def matmul(
    x: Array,
    matrices: tuple[tuple[Array, Array], ...],
    *,
    dtype: Any,
    interpret: Any = False,
) -> list[Array]:
    """As `api.matmul`."""
    num_rows, depth = x.shape
    chunks = depth // INPUTS
    rows = pl.cdiv(num_rows, UNIT) * UNIT
    x = jnp.pad(x, ((0, rows - num_rows), (0, 0)))
    x = x.reshape(rows, chunks, INPUTS).swapaxes(0, 1)
    tiles = [words.shape[0] for words, _ in matrices]
    num_splits = _num_splits(chunks, sum(tiles), 2 if interpret else BLOCKS * NUM_SMS)
    num_steps = chunks // num_splits

    def body(x_gmem, *refs):
        operands, refs = refs[: 2 * len(tiles)], refs[2 * len(tiles) :]
        results, (x_smem, full, *buffers) = refs[: len(tiles)], refs[len(tiles) :]
        split = lax.axis_index("split")
        mine = pl.ds(split * num_steps, num_steps)
        plgpu.copy_gmem_to_smem(x_gmem.at[mine], x_smem, full)

        def run(number, tile):
            words, scales = operands[2 * number : 2 * number + 2]
            result = results[number].at[split, tile]
            _run_tile(words.at[tile, mine], scales.at[tile, mine], x_smem, full, result, buffers)

        at_its_tile(lax.axis_index("tile"), tiles, run)

    compiler_params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        approx_math=True,
    )
    shapes = [(num_splits, num, OUTPUTS, rows) for num in tiles]
    interpreted = (plgpu.SMEM((OUTPUTS, INPUTS), x.dtype),) if interpret else ()
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        scratch_types=(
            swizzled((num_steps, rows, INPUTS), x.dtype),
            plgpu.Barrier(),
            *interpreted,
        ),
        grid=(num_splits, sum(tiles)),
        grid_names=("split", "tile"),
        compiler_params=compiler_params,
        interpret=interpret,
    )
    parts = kernel(x, *(array for matrix in matrices for array in matrix))
    sums = (part.sum(0)[..., :num_rows].reshape(-1, num_rows) for part in parts)
    return [each.T.astype(dtype) for each in sums]


def _num_splits(chunks: int, num_tiles: int, room: int) -> int:
    """Into how many parts the inputs are divided, so that all blocks run at once."""
    divisors = (n for n in range(1, chunks + 1) if chunks % n == 0)
    return max((n for n in divisors if n * num_tiles <= room), default=1)


def _run_tile(words, scales, x_smem, full, result, buffers):
    """64 outputs over a block's inputs."""
    steps = Steps(words, scales, 0, words.shape[0])
    # The first words are on their way while the inputs come.
    loaded = steps.load_first()
    plgpu.barrier_wait(full)

    def product(unit, offset, step):
        return _product(unit, offset, x_smem.at[step], buffers)

    result[...] = steps.total(loaded, result.shape, product)


def _product(words, offset, x, buffers):
    """(integers of the words - offset) [64, 128] times x [rows, 128] transposed, in float32."""

    def run(accumulator):
        if buffers:  # interpretation takes left operands from shared memory
            (left,) = buffers
            left[...] = (unpack_unit(words) - offset).astype(left.dtype)
        else:
            left = _to_bfloat16(offset)(words)
        plgpu.wgmma(accumulator, left, x.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((OUTPUTS, x.shape[0]), jnp.float32))


@functools.cache
def _to_bfloat16(offset: int):
    """A function of words that gives their integers less `offset` as a left operand."""

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct((OUTPUTS, INPUTS), jnp.bfloat16, layout=MATRIX),
    )
    def convert(_, words):
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((OUTPUTS, INPUTS)), object)
        columns = registers.reshape(INPUTS // 8, 2)
        for number, operands in enumerate(operands_of(words, offset)):
            for place, operand in enumerate(operands):
                column = 2 * number + place // 2
                columns[column, place % 2] = mgpu.utils.bitcast(operand, pair)
        return of_registers(registers, mgpu.WGMMA_LAYOUT)

    return convert
