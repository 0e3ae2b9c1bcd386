"""Weights in 8 or 4 bits for inference.

Matrices of layers and experts are quantised; embedding, unembedding, norms, routers and biases keep
their type.
"""

import dataclasses
import math
from typing import Any

import jax

from jaxscale import tree
from jaxscale.models.parameters import Parameter, Table
from jaxscale.ops.quantised import QuantisedMatrix, quantise
from jaxscale.types import Array, Params, Role, check_choice, check_types


@dataclasses.dataclass(frozen=True)
class QuantisedConfig:
    """How weights are quantised: round to nearest, symmetric, with a scale for each 128 inputs.

    Args:
        bits: 8 or 4.
    """

    bits: int

    def __post_init__(self):
        check_types(self)
        check_choice("QuantisedConfig.bits", self.bits, (8, 4))


def quantised(
    params: Params,
    table: Table,
    config: QuantisedConfig,
) -> Params:
    """The tree in which each matrix is a `QuantisedMatrix`.

    Args:
        params: the parameter tree; its arrays may be freed one by one.
        table: of the model.
        config: how.
    """
    parameters = tree.flatten(table)

    def one(path: str, leaf: Array) -> Any:
        parameter = parameters[path]
        if parameter.role not in (Role.MATRIX, Role.EXPERT):
            return leaf
        return quantise(leaf, *_dims(path, parameter), config.bits)

    return tree.map_with_path(one, params)


def dequantised(params: Params, dtype: str) -> Params:
    """The tree with whole matrices again, in a type; the rest is as it was."""

    def one(leaf: Any) -> Any:
        return leaf.whole(dtype) if is_quantised(leaf) else leaf

    return jax.tree.map(one, params, is_leaf=is_quantised)


def is_quantised(leaf: Any) -> bool:
    """Whether a matrix is in few bits."""
    return isinstance(leaf, QuantisedMatrix)


def _dims(path: str, parameter: Parameter) -> tuple[int, int]:
    """(stacked dims, dims of a matrix's inputs): "o" has heads and a head's elements as inputs."""
    stacked = parameter.dims.startswith("L") + ("E" in parameter.dims)
    return stacked, 2 if path.endswith("attention/o") else 1


def num_bytes(params: Params) -> int:
    """Bytes of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
