"""Products with matrices in 4 or 8 bits for Hopper GPUs, as a Pallas kernel for Mosaic GPU.

A block computes 64 outputs; its warpgroups share the inputs, and the first adds up their sums. What
stands around a product in a layer is in the same launch: the norm before it, the gate and the
residual behind it. A step of decoding is a chain of such products, in which launches count.

Words go from memory to registers some steps ahead of their use, for reading them is what takes the
time. There three operations make two bfloat16 of two integers: an integer of 4 bits below the
exponent of 128 is 128 plus the integer. They are the left operand of the tensor cores' products,
whose 8 columns are the tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, memref, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.products import MATRIX, ROW, spread
from jaxscale.kernels.persistent import NUM_SMS
from jaxscale.kernels.quantised_matmul.packing import INPUTS, OFFSETS, OUTPUTS, unpack_unit
from jaxscale.kernels.quantised_matmul.tensor_cores import (
    LAYOUT,
    THREADS,
    UNIT,
    index,
    lane,
    multiply,
    of_registers,
)

LANES = 32  # of a warp
AHEAD = 4  # steps whose words are on their way
MARGIN = 8  # elements behind a row of x, so that eight rows lie in different banks
EACH_THREAD = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)


# jit: the kernel is lowered once for all layers.
@functools.partial(jax.jit, static_argnames=("dtype", "epsilon", "is_gated", "interpret"))
def matmul(
    x: Array,
    matrices: tuple[tuple[Array, Array], ...],
    *,
    dtype: Any,
    scale: Array | None,
    epsilon: float,
    residual: Array | None,
    is_gated: bool,
    interpret: Any = False,
) -> list[Array]:
    """As `api.matmul`; `scale` and `epsilon` are the norm's."""
    num_rows, depth = x.shape
    # Of each result the numbers of its matrices, and the tiles of 64 outputs.
    groups = [(0, 1)] if is_gated else [(number,) for number in range(len(matrices))]
    tiles = [matrices[first][0].shape[0] for first, *_ in groups]
    num_parts = _num_parts(depth // INPUTS, sum(tiles))
    inputs = {"x": x, "scale": scale, "residual": residual}
    inputs = {name: array for name, array in inputs.items() if array is not None}

    def body(*refs):
        refs = iter(refs)
        given = {name: next(refs) for name in inputs}
        words_and_scales = [(next(refs), next(refs)) for _ in matrices]
        results = [next(refs) for _ in groups]
        scratch = tuple(refs)
        block = _Block(*scratch, **given, depth=depth, epsilon=epsilon, interpret=interpret)

        def run(number, tile):
            operands = [words_and_scales[matrix] for matrix in groups[number]]
            block.run(tile, operands, results[number])

        at_its_tile(lax.axis_index("tile"), tiles, run)

    compiler_params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        approx_math=True,
    )
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((num_rows, num * OUTPUTS), dtype) for num in tiles),
        scratch_types=(
            plgpu.SMEM((num_rows, depth + MARGIN), x.dtype),
            plgpu.SMEM((num_rows, num_parts * THREADS), jnp.float32),
            plgpu.SMEM((num_parts, len(groups[0]), OUTPUTS, UNIT), jnp.float32),
            plgpu.Barrier(num_arrivals=num_parts),
        ),
        grid=(sum(tiles),),
        grid_names=("tile",),
        num_threads=num_parts,
        thread_name="part",
        compiler_params=compiler_params,
        interpret=interpret,
    )
    flat = [array for matrix in matrices for array in matrix]
    return list(kernel(*inputs.values(), *flat))


def at_its_tile(tile, counts, run):
    """Calls `run(number of the matrix, its tile)` where the tiles of several follow each other."""
    begin = 0
    for number, count in enumerate(counts):
        is_here = (tile >= begin) & (tile < begin + count)
        pl.when(is_here)(functools.partial(run, number, tile - begin))
        begin += count


def _num_parts(chunks: int, num_blocks: int) -> int:
    """Warpgroups of a block, each of which takes as many inputs.

    A multiprocessor has room for one block of four, or two of two.
    """
    most = 4 if num_blocks <= NUM_SMS else 2
    return next(num for num in range(most, 0, -1) if chunks % num == 0)


@dataclasses.dataclass(frozen=True)
class _Block:
    """References of a block; `scale` and `residual` where there are any."""

    x_smem: Any
    squares: Any
    sums: Any
    ready: Any
    x: Any
    depth: int
    epsilon: float
    interpret: Any
    scale: Any = None
    residual: Any = None

    def run(self, tile, matrices, result):
        """64 outputs, of two matrices where the first is the gate of the second."""
        part = lax.axis_index("part")
        num_parts = self.sums.shape[0]
        num_steps = self.depth // INPUTS // num_parts
        first = part * num_steps
        steps = [
            Steps(words.at[tile], scales.at[tile], first, num_steps) for words, scales in matrices
        ]
        # The first words are on their way while the inputs are taken.
        loaded = [each.load_first() for each in steps]
        self._take_inputs(pl.ds(first * INPUTS, num_steps * INPUTS), part)

        def product(unit, offset, step):
            inputs = pl.ds((first + step) * INPUTS, INPUTS)
            return _product(unit, offset, self.x_smem.at[:, inputs], self.interpret)

        for matrix, each in enumerate(steps):
            total = each.total(loaded[matrix], (OUTPUTS, UNIT), product)
            self.sums.at[part, matrix][...] = total
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.ready)
        pl.when(part == 0)(functools.partial(self._finish, tile, result))

    def _take_inputs(self, inputs, part):
        """Puts a warpgroup's share of the inputs into shared memory, times the norm's scale."""
        layout = _strided(inputs.size)
        scale = None
        if self.scale is not None:
            scale = plgpu.load(self.scale.at[inputs], layout=layout).astype(jnp.float32)
        for row in range(self.x.shape[0]):
            values = plgpu.load(self.x.at[row, inputs], layout=layout)
            if scale is not None:
                wide = values.astype(jnp.float32)
                threads = pl.ds(part * THREADS, THREADS)
                self.squares.at[row, threads][...] = _by_thread(wide * wide, self.interpret)
                values = (wide * scale).astype(values.dtype)
            self.x_smem.at[row, inputs][...] = values
        plgpu.commit_smem()

    def _finish(self, tile, result):
        """Adds up the sums of all warpgroups and what stands behind the product."""
        plgpu.barrier_wait(self.ready)
        num_matrices = self.sums.shape[1]
        products = [self._sum_of_parts(matrix) for matrix in range(num_matrices)]
        column = plgpu.broadcasted_iota(jnp.int32, products[0].shape, 1, layout=MATRIX)
        outputs = pl.ds(tile * OUTPUTS, OUTPUTS)
        for row in range(self.x.shape[0]):
            of_row = [jnp.where(column == row, each, 0.0).sum(1) for each in products]
            if self.scale is not None:
                sum_of_squares = _total(self.squares.at[row], self.interpret)
                factor = lax.rsqrt(sum_of_squares / self.depth + self.epsilon)
                of_row = [each * factor for each in of_row]
            if num_matrices == 2:
                gate, up = of_row
                y = up * gate / (1 + jnp.exp(-gate))
            else:
                (y,) = of_row
            if self.residual is not None:
                residual = plgpu.load(self.residual.at[row, outputs], layout=ROW, optimized=False)
                y = y + residual.astype(jnp.float32)
            result.at[row, outputs][...] = y.astype(result.dtype)

    def _sum_of_parts(self, matrix):
        """The product with a matrix over all inputs, [64, 8]."""
        num_parts = self.sums.shape[0]
        parts = [
            plgpu.load(self.sums.at[part, matrix], layout=MATRIX, optimized=False)
            for part in range(num_parts)
        ]
        return sum(parts[1:], parts[0])


@dataclasses.dataclass(frozen=True)
class Steps:
    """A warpgroup's inputs of a tile, 128 a step."""

    words: Any
    scales: Any
    first: Any
    num: int

    def load_first(self):
        """What `load` gives of the first steps."""
        return [self.load(step) for step in range(min(AHEAD, self.num))]

    def load(self, step):
        """(words of each unit, scales) of a step."""
        chunk = self.first + step
        num_planes = self.words.shape[1]
        units = [plgpu.load(self.words.at[chunk, i], layout=LAYOUT) for i in range(num_planes)]
        return units, plgpu.load(self.scales.at[chunk], layout=ROW, optimized=False)

    def total(self, loaded, shape, product):
        """The sum over all steps [64, tokens]; they are written out, so that loads run ahead.

        Args:
            loaded: what `load_first` gave.
            shape: of the sum.
            product: (words of a unit, their offset, step) -> (integers - offset) times the inputs.
        """
        total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)
        offsets = OFFSETS[4 * self.words.shape[1]]
        for step in range(self.num):
            units, scale = loaded[step]
            if step + AHEAD < self.num:
                loaded.append(self.load(step + AHEAD))
            by_unit = (
                product(unit, offset, step) for unit, offset in zip(units, offsets, strict=True)
            )
            # The first unit has the highest bits.
            value = functools.reduce(lambda upper, lower: 16 * upper + lower, by_unit)
            total = total + spread(scale.astype(jnp.float32), shape, 0) * value
        return total


def _strided(size):
    """How a warpgroup's registers hold a vector; as many neighbours a thread as there can be."""
    return plgpu.Layout.WG_STRIDED((size,), vec_size=_neighbours(size))


def _neighbours(size):
    return next(num for num in (8, 4, 2, 1) if size % (num * THREADS) == 0)


def _by_thread(values, interpret):
    """A vector's sums over the elements of each thread, [128]."""
    if interpret:
        return values.reshape(-1, THREADS).sum(0)
    layout = _strided(values.shape[0])

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=EACH_THREAD),
    )
    def add(_, values):
        elements = (
            vector.extract(register, [], [place])
            for register in values.registers.flat
            for place in range(_neighbours(values.shape[0]))
        )
        total = functools.reduce(arith.addf, elements)
        one = vector.broadcast(ir.VectorType.get((1,), ir.F32Type.get()), total)
        layout = EACH_THREAD.to_mgpu()
        return of_registers(np.full(layout.registers_shape((THREADS,)), one, object), layout)

    return add(values)


def _total(ref, interpret):
    """The sum of a vector in shared memory, for all outputs [64]; each warp adds it up."""
    if interpret:
        return jnp.full((OUTPUTS,), ref[...].sum())

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((OUTPUTS,), jnp.float32, layout=ROW),
    )
    def add(_, ref):
        own_lane = lane()
        elements = (
            memref.load(ref, [arith.addi(own_lane, index(begin))])
            for begin in range(0, ref.type.shape[0], LANES)
        )
        total = functools.reduce(arith.addf, elements)
        for distance in (16, 8, 4, 2, 1):
            total = arith.addf(total, mgpu.utils.shfl_bfly(total, distance))
        layout = ROW.to_mgpu()
        one = vector.broadcast(ir.VectorType.get((layout.vector_length,), total.type), total)
        return of_registers(np.full(layout.registers_shape((OUTPUTS,)), one, object), layout)

    return add(ref)


def _product(words, offset, x, interpret):
    """(integers of the words - offset) [64, 128] times x [rows, 128] transposed, in float32."""
    if interpret:
        left = (unpack_unit(words) - offset).astype(jnp.float32)
        right = x[...].astype(jnp.float32)
        return jnp.pad(left @ right.T, ((0, 0), (0, UNIT - len(right))))
    return multiply(offset)(words, x)
