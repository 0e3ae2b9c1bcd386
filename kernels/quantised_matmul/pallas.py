"""Products with matrices in 4 or 8 bits for Hopper GPUs, as a Pallas kernel for Mosaic GPU.

A block is one warpgroup, which computes 64 outputs over a part of the inputs. Words go from memory
to registers some steps ahead of their use, for reading them is what takes the time. There two
operations make four bfloat16 of 16 bits: an integer of 4 bits below the exponent of 128 is 128 plus
the integer. They are the left operand of the tensor cores' products, whose 8 columns are the
tokens. Each group's sum is scaled, and parts of the inputs are added up afterwards.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.products import MATRIX, ROW, spread
from jaxscale.kernels.persistent import NUM_SMS, swizzled
from jaxscale.kernels.quantised_matmul.packing import INPUTS, OFFSETS, OUTPUTS, WORDS, unpack_unit

UNIT = 8  # rows of `x`: the fewest columns of a product
BLOCKS = 4  # that a multiprocessor has room for
AHEAD = 4  # steps whose words are on their way
LAYOUT = plgpu.Layout.WG_STRIDED((WORDS,), vec_size=4)


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
    chunks, rows = depth // INPUTS, pl.cdiv(num_rows, UNIT) * UNIT
    x = jnp.pad(x, ((0, rows - num_rows), (0, 0)))
    x = x.reshape(rows, chunks, INPUTS).swapaxes(0, 1)
    tiles = [words.shape[0] for words, _ in matrices]
    num_splits = _num_splits(chunks, sum(tiles), 2 if interpret else BLOCKS * NUM_SMS)
    num_steps = chunks // num_splits

    def body(x_gmem, *refs):
        operands, results = refs[: 2 * len(tiles)], refs[2 * len(tiles) : 3 * len(tiles)]
        x_smem, full, *buffers = refs[3 * len(tiles) :]
        split, tile = lax.axis_index("split"), lax.axis_index("tile")
        mine = pl.ds(split * num_steps, num_steps)
        plgpu.copy_gmem_to_smem(x_gmem.at[mine], x_smem, full)
        begin = 0
        for i, num in enumerate(tiles):
            words, scales = (operands[2 * i + j].at[tile - begin, mine] for j in range(2))
            result = results[i].at[split, tile - begin]
            run = functools.partial(_run_tile, words, scales, x_smem, full, result, buffers)
            pl.when((tile >= begin) & (tile < begin + num))(run)
            begin += num

    compiler_params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        approx_math=True,
    )
    interpreted = (plgpu.SMEM((OUTPUTS, INPUTS), x.dtype),) if interpret else ()
    kernel = plgpu.kernel(
        body,
        out_type=tuple(
            jax.ShapeDtypeStruct((num_splits, num, OUTPUTS, rows), jnp.float32) for num in tiles
        ),
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
    """64 outputs over a block's inputs; its steps are written out, so that loads run ahead."""
    num_steps, num_planes = words.shape[0], words.shape[1]
    offsets = OFFSETS[4 * num_planes]

    def load(step):
        units = [plgpu.load(words.at[step, i], layout=LAYOUT) for i in range(num_planes)]
        scale = plgpu.load(scales.at[step], layout=ROW, optimized=False)
        return units, scale

    loaded = [load(step) for step in range(min(AHEAD, num_steps))]
    total = plgpu.layout_cast(jnp.zeros(result.shape, jnp.float32), MATRIX)
    plgpu.barrier_wait(full)
    for step in range(num_steps):
        units, scale = loaded[step]
        if step + AHEAD < num_steps:
            loaded.append(load(step + AHEAD))
        value = None
        for unit, offset in zip(units, offsets, strict=True):
            product = _product(unit, offset, x_smem.at[step], buffers)
            value = product if value is None else 16 * value + product
        total = total + spread(scale.astype(jnp.float32), total.shape, 0) * value
    result[...] = total


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
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((OUTPUTS, INPUTS)), object)
        columns = registers.reshape(INPUTS // 8, 2)
        for number in range(8):
            word = vector.extract(words.registers.flat[number // 4], [], [number % 4])
            for place in range(4):  # within a word first the half of the rows, then of the inputs
                shifted = arith.shrui(word, arith.constant(i32, 4 * place))
                operand = _pair(shifted, 0x4300 + offset)
                columns[2 * number + place // 2, place % 2] = mgpu.utils.bitcast(operand, pair)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
        )

    return convert


def _pair(word, zero):
    """The lowest 4 bits of both halves of a word as bfloat16, less `zero`, which is one too."""
    return mgpu.utils.inline_ptx(
        f"""{{ .reg .b32 sum, zero;
        lop3.b32 sum, $1, 0x000F000F, 0x43004300, (0xf0 & 0xcc) | 0xaa;
        mov.b32 zero, 0x{zero:04x}{zero:04x};
        sub.bf16x2 $0, sum, zero; }}""",
        word,
        result_types=word.type,
    )
