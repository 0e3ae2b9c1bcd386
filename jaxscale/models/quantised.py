"""Weights in 8 or 4 bits for inference: integers with a scale for each group of inputs.

Matrices of layers and experts are quantised; embedding, unembedding, norms, routers and biases keep
their type. A forward makes a layer's matrices from them before it uses them.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale import tree
from jaxscale.models.parameters import Parameter, Table
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, Params, Role, check_choice, check_positive, check_types

DTYPES = {8: jnp.int8, 4: jnp.int4}
VALUES, SCALES = "values", "scales"


@dataclasses.dataclass(frozen=True)
class QuantisedConfig:
    """How weights are quantised: round to nearest, symmetric, by groups of inputs.

    Source: Dettmers and Zettlemoyer 2022 (arXiv 2212.09720), section 2.
    Args:
        bits: 8 or 4.
        group: inputs that share a scale with an output; where it does not divide the inputs, their
            largest common divisor.
    """

    bits: int
    group: int = 128

    def __post_init__(self):
        check_types(self)
        check_choice("QuantisedConfig.bits", self.bits, tuple(DTYPES))
        check_positive("QuantisedConfig.group", self.group)

    @property
    def largest(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1


def quantised(
    params: Params,
    table: Table,
    config: QuantisedConfig,
) -> Params:
    """The tree in which each matrix is a dict of integers and scales.

    Args:
        params: the parameter tree; its arrays may be freed one by one.
        table: of the model.
        config: how.
    Returns:
        `values`, integers in the shape of the matrix, and `scales`, in the matrix's type and in its
        shape but for the dim of the inputs, which counts groups.
    """
    parameters = tree.flatten(table)

    def one(path: str, leaf: Array) -> Any:
        parameter = parameters[path]
        if parameter.role not in (Role.MATRIX, Role.EXPERT):
            return leaf
        return _quantised(leaf, _input_axis(path, parameter), config)

    return tree.map_with_path(one, params)


def quantise(
    matrix: Array,
    axis: int,
    config: QuantisedConfig,
) -> Params:
    """One matrix, whose inputs are along `axis`, as `quantised` returns it."""
    size = matrix.shape[axis]
    group = math.gcd(size, config.group)
    by_group = _split(accumulator(matrix), axis, group)
    scales = jnp.abs(by_group).max(axis + 1, keepdims=True) / config.largest
    # The scale is rounded first, so that the integers fit the scale that is kept.
    scales = scales.astype(matrix.dtype)
    divisor = jnp.where(scales == 0, 1, scales).astype(by_group.dtype)
    values = jnp.clip(jnp.round(by_group / divisor), -config.largest, config.largest)
    return {
        VALUES: values.reshape(matrix.shape).astype(DTYPES[config.bits]),
        SCALES: scales.squeeze(axis + 1),
    }


_quantised = jax.jit(quantise, static_argnums=(1, 2))


def dequantised(params: Params, dtype: str) -> Params:
    """The tree with whole matrices again, in a type; the rest is as it was."""
    if not isinstance(params, dict):
        return params
    if params.keys() == {VALUES, SCALES}:
        return _matrix(params[VALUES], params[SCALES], dtype)
    return {name: dequantised(part, dtype) for name, part in params.items()}


def _matrix(values: Array, scales: Array, dtype: str) -> Array:
    axis = next((a for a, n in enumerate(scales.shape) if n != values.shape[a]), 0)
    group = values.shape[axis] // scales.shape[axis]
    by_group = _split(values.astype(dtype), axis, group)
    return (by_group * jnp.expand_dims(scales.astype(dtype), axis + 1)).reshape(values.shape)


def _split(matrix: Array, axis: int, group: int) -> Array:
    """The matrix with its groups apart, along two axes from `axis` on."""
    shape = list(matrix.shape)
    shape[axis : axis + 1] = [shape[axis] // group, group]
    return matrix.reshape(shape)


def _input_axis(path: str, parameter: Parameter) -> int:
    """The last dim of a matrix's inputs: of "o" that within a head, of the others the only one."""
    before = parameter.dims.startswith("L") + ("E" in parameter.dims)
    return before + (1 if path.endswith("attention/o") else 0)


def num_bytes(params: Params) -> int:
    """Bytes of a tree, of whose 4-bit integers two are in a byte."""
    leaves = jax.tree.leaves(params)
    bits = (4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize for leaf in leaves)
    return sum(math.prod(leaf.shape) * each for leaf, each in zip(leaves, bits)) // 8
