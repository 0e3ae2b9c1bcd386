"""A matrix in 4 or 8 bits: integers with a scale for each group of inputs and output."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxscale.kernels.quantised_matmul import reference
from jaxscale.kernels.quantised_matmul.packing import INPUTS, OUTPUTS, look_up, pack, unpack
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array

GROUP = INPUTS  # inputs that share a scale


class Integers(NamedTuple):
    """A matrix in few bits as others store it.

    Args:
        values: [*inputs, *outputs] int8.
        scales: [groups of GROUP inputs, *outputs].
    """

    values: Array
    scales: Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales"],
    meta_fields=["shape", "num_inputs"],
)
@dataclasses.dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix in 4 or 8 bits, or a stack of them with leading dims.

    Args:
        words: the integers, as `kernels.quantised_matmul.packing` packs them; inputs and outputs
            are padded with zeros to whole units.
        scales: of each output and INPUTS inputs, in the type that the matrix had.
        shape: of one matrix, its inputs before its outputs.
        num_inputs: dims of `shape` that are inputs.
    """

    words: Array
    scales: Array
    shape: tuple[int, ...]
    num_inputs: int

    @property
    def bits(self) -> int:
        """Of an integer."""
        return 4 * self.words.shape[-2]

    @property
    def dtype(self) -> jnp.dtype:
        """That of the scales."""
        return self.scales.dtype

    @property
    def depth(self) -> int:
        """Inputs."""
        return math.prod(self.shape[: self.num_inputs])

    @property
    def width(self) -> int:
        """Outputs."""
        return math.prod(self.shape[self.num_inputs :])

    def whole(self, dtype: str) -> Array:
        """The matrix, or stack of matrices, in a type of floating point."""

        def one(words: Array, scales: Array) -> Array:
            padded = reference.dequantise(words, scales)
            return padded[: self.depth, : self.width].reshape(self.shape).astype(dtype)

        for _ in range(self.scales.ndim - 3):
            one = jax.vmap(one)
        return one(self.words, self.scales)

    def integers(self, index: tuple[int, ...] = ()) -> Integers:
        """One matrix of the stack as it is stored."""
        one = dataclasses.replace(self, words=self.words[index], scales=self.scales[index])
        return _integers(one)


@jax.jit
def _integers(matrix: QuantisedMatrix) -> Integers:
    shape, num_inputs = matrix.shape, matrix.num_inputs
    values = unpack(matrix.words)[: matrix.depth, : matrix.width]
    by_group = jnp.moveaxis(matrix.scales, 0, 1)
    scales = by_group.reshape(len(by_group), -1)[:, : matrix.width]
    scales = scales.reshape(-1, *shape[num_inputs:])
    return Integers(values.astype(jnp.int8).reshape(shape), scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedTable:
    """A table [V, D] in 4 or 8 bits, whose rows are looked up or multiplied with.

    Args:
        matrix: [D, V].
    """

    matrix: QuantisedMatrix

    @property
    def shape(self) -> tuple[int, int]:
        """(V, D)."""
        return self.matrix.width, self.matrix.depth

    @property
    def bits(self) -> int:
        """Of an integer."""
        return self.matrix.bits

    @property
    def dtype(self) -> jnp.dtype:
        """That of the scales."""
        return self.matrix.dtype

    def __len__(self) -> int:
        """V."""
        return self.matrix.width

    def __getitem__(self, tokens: Array) -> Array:
        """Rows [..., D] of tokens [...], in the type of the scales."""
        numbers = tokens.reshape(-1)
        integers = look_up(self.matrix.words, numbers).reshape(len(numbers), -1, INPUTS)
        scales = self.matrix.scales[numbers // OUTPUTS, :, numbers % OUTPUTS]
        padded = (integers * accumulator(scales)[..., None]).reshape(len(numbers), -1)
        rows = padded[:, : self.matrix.depth].astype(scales.dtype)
        return rows.reshape(*tokens.shape, self.matrix.depth)

    def whole(self, dtype: str) -> Array:
        """The table in a type of floating point."""
        return self.matrix.whole(dtype).T


@functools.partial(jax.jit, static_argnums=(1, 2))
def from_integers(integers: Integers, num_inputs: int, bits: int) -> QuantisedMatrix:
    """The matrix of integers that somebody has rounded.

    Args:
        integers: with as many dims of outputs in both.
        num_inputs: dims that are inputs.
        bits: 8 or 4, which the integers fit.
    """
    shape = integers.values.shape
    depth = math.prod(shape[:num_inputs])
    values = _padded(integers.values.reshape(depth, -1))
    scales = integers.scales.reshape(len(integers.scales), -1)
    scales = jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % OUTPUTS)))
    return QuantisedMatrix(pack(values, bits), _by_tile(scales), shape, num_inputs)


def _padded(matrix: Array) -> Array:
    """A matrix [inputs, outputs] with zeros up to whole units."""
    return jnp.pad(matrix, ((0, -matrix.shape[0] % INPUTS), (0, -matrix.shape[1] % OUTPUTS)))


def _by_tile(scales: Array) -> Array:
    """Scales [groups, outputs] as they are stored."""
    return scales.reshape(len(scales), -1, OUTPUTS).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def quantise(
    matrix: Array,
    num_stacked: int,
    num_inputs: int,
    bits: int,
) -> QuantisedMatrix:
    """Rounds to the nearest multiples of scales that make the largest of each group fit.

    Source: Dettmers and Zettlemoyer 2022 (arXiv 2212.09720), section 2.
    Args:
        matrix: [stacked dims, inputs, outputs].
        num_stacked: dims of the stack.
        num_inputs: dims of a matrix's inputs.
        bits: 8 or 4.
    """
    shape = matrix.shape[num_stacked:]
    depth = math.prod(shape[:num_inputs])

    def one(matrix: Array) -> tuple[Array, Array]:
        flat = _padded(accumulator(matrix.reshape(depth, -1)))
        largest = 2 ** (bits - 1) - 1
        by_group = flat.reshape(-1, INPUTS, flat.shape[1])
        # The scale is rounded first, so that the integers fit the scale that is kept.
        scales = (jnp.abs(by_group).max(1) / largest).astype(matrix.dtype)
        divisor = jnp.where(scales == 0, 1, scales).astype(flat.dtype)[:, None]
        values = jnp.clip(jnp.round(by_group / divisor), -largest, largest)
        return pack(values.reshape(flat.shape), bits), _by_tile(scales)

    for _ in range(num_stacked):
        one = jax.vmap(one)
    return QuantisedMatrix(*one(matrix), shape, num_inputs)
