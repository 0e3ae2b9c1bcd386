"""Products of integers and inputs by a warp's tensor cores, in registers."""

import functools

import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, nvvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.products import MATRIX
from jaxscale.kernels.quantised_matmul.packing import OUTPUTS, WORDS

UNIT = 8  # columns of a product: the most rows of `x`
THREADS = 128  # of a warpgroup
LAYOUT = plgpu.Layout.WG_STRIDED((WORDS,), vec_size=4)


@functools.cache
def multiply(offset: int):
    """A function of words and inputs in shared memory that gives their product [64, 8]."""

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((OUTPUTS, UNIT), jnp.float32, layout=MATRIX),
    )
    def product(_, words, x):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        num_rows = x.type.shape[0]
        # The tensor cores take of each thread two neighbouring inputs of one row, twice.
        own_lane = lane()
        row = arith.divui(own_lane, index(4))
        neighbours = arith.muli(arith.remui(own_lane, index(4)), index(2))
        is_row = arith.cmpi(arith.CmpIPredicate.ult, row, index(num_rows))
        row = arith.minui(row, index(num_rows - 1))
        zero = arith.constant(i32, 0)
        totals = [arith.constant(f32, 0.0)] * 4
        two_inputs = ir.VectorType.get((2,), ir.BF16Type.get())
        for number, left in enumerate(operands_of(words, offset)):
            right = []
            for half in range(2):
                column = arith.addi(neighbours, index(16 * number + 8 * half))
                loaded = vector.load(two_inputs, x, [row, column])
                in_a_word = mgpu.utils.bitcast(loaded, i32)
                right.append(arith.select(is_row, in_a_word, zero))
            totals = _mma(left, right, totals)
        layout = MATRIX.to_mgpu()
        registers = np.empty(layout.registers_shape((OUTPUTS, UNIT)), object)
        registers.reshape(2)[:] = [_vector(totals[:2]), _vector(totals[2:])]
        return of_registers(registers, layout)

    return product


def of_registers(registers, layout):
    """The array of floats that a warpgroup has in registers laid out so."""
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def operands_of(words, offset):
    """The left operands of a thread's words less `offset`: of 16 inputs each, 4 pairs of bfloat16.

    Within a word as within an operand come first the halves of the rows, then of the inputs.
    """
    i32 = ir.IntegerType.get_signless(32)
    for number in range(WORDS // THREADS):
        word = vector.extract(words.registers.flat[number // 4], [], [number % 4])
        pairs = []
        for place in range(4):
            shifted = arith.shrui(word, arith.constant(i32, 4 * place))
            pairs.append(_pair(shifted, 0x4300 + offset))
        yield pairs


def _mma(left, right, totals):
    """One product of a warp, 16 outputs, 16 inputs, 8 tokens, added to the totals."""
    f32 = ir.F32Type.get()
    return mgpu.utils.inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        *left,
        *right,
        *totals,
        result_types=[f32] * 4,
    )


def _vector(values):
    pair = ir.VectorType.get((len(values),), values[0].type)
    return vector.from_elements(pair, values)


def index(value):
    """A number as a place in memory."""
    return arith.constant(ir.IndexType.get(), value)


def lane():
    """A thread's number in its warp."""
    return arith.index_cast(ir.IndexType.get(), nvvm.read_ptx_sreg_laneid())


def _pair(word, zero):
    """The lowest 4 bits of both halves of a word as two bfloat16, less `zero`, which is one too."""
    return mgpu.utils.inline_ptx(
        f"""{{ .reg .b32 sum, zero;
        lop3.b32 sum, $1, 0x000F000F, 0x43004300, (0xf0 & 0xcc) | 0xaa;
        mov.b32 zero, 0x{zero:04x}{zero:04x};
        sub.bf16x2 $0, sum, zero; }}""",
        word,
        result_types=word.type,
    )
