"""A matrix in 4 or 8 bits: integers with a scale for each group of inputs and output."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxscale.kernels.quantised_matmul import reference
from jaxscale.kernels.quantised_matmul.packing import INPUTS, OUTPUTS, pack
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array


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
        flat = accumulator(matrix.reshape(depth, -1))
        margins = ((0, -depth % INPUTS), (0, -flat.shape[1] % OUTPUTS))
        flat = jnp.pad(flat, margins)
        largest = 2 ** (bits - 1) - 1
        by_group = flat.reshape(-1, INPUTS, flat.shape[1])
        # The scale is rounded first, so that the integers fit the scale that is kept.
        scales = (jnp.abs(by_group).max(1) / largest).astype(matrix.dtype)
        divisor = jnp.where(scales == 0, 1, scales).astype(flat.dtype)[:, None]
        values = jnp.clip(jnp.round(by_group / divisor), -largest, largest)
        by_tile = scales.reshape(len(scales), -1, OUTPUTS).swapaxes(0, 1)
        return pack(values.reshape(flat.shape), bits), by_tile

    for _ in range(num_stacked):
        one = jax.vmap(one)
    return QuantisedMatrix(*one(matrix), shape, num_inputs)
