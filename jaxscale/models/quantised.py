"""Weights in 8 or 4 bits for inference.

Matrices of layers and experts are quantised, and embedding and unembedding if it is said; norms,
routers, biases and positions keep their type.
"""

import dataclasses
import math
from typing import Any

import jax

from jaxscale import tree
from jaxscale.models.parameters import Parameter, Table
from jaxscale.ops.quantised import QuantisedMatrix, QuantisedTable, quantise
from jaxscale.types import Array, Params, Role, check_choice, check_types

TABLES = (Role.EMBEDDING, Role.UNEMBEDDING)


@dataclasses.dataclass(frozen=True)
class QuantisedConfig:
    """How weights are quantised: round to nearest, symmetric, with a scale for each 128 inputs.

    Args:
        bits: of the matrices, 8 or 4.
        embedding_bits: of embedding and unembedding, 8 or 4; None keeps their type.
    """

    bits: int
    embedding_bits: int | None = None

    def __post_init__(self):
        check_types(self)
        check_choice("QuantisedConfig.bits", self.bits, (8, 4))
        check_choice("QuantisedConfig.embedding_bits", self.embedding_bits, (None, 8, 4))

    def bits_of(self, role: Role) -> int | None:
        """Bits of the parameters of a role; None for those that keep their type."""
        if role in TABLES:
            return self.embedding_bits
        return self.bits if role in (Role.MATRIX, Role.EXPERT) else None


def quantised(
    params: Params,
    table: Table,
    config: QuantisedConfig,
) -> Params:
    """The tree in which each matrix is a `QuantisedMatrix`, a quantised table a `QuantisedTable`.

    Args:
        params: the parameter tree; its arrays may be freed one by one.
        table: of the model.
        config: how.
    """
    parameters = tree.flatten(table)

    def one(path: str, leaf: Array) -> Any:
        parameter = parameters[path]
        bits = config.bits_of(parameter.role)
        if bits is None:
            return leaf
        if parameter.role in TABLES:
            return QuantisedTable(quantise(leaf.T, 0, 1, bits))
        return quantise(leaf, *dims_of(path, parameter), bits)

    return tree.map_with_path(one, params)


def dequantised(params: Params, dtype: str) -> Params:
    """The tree with whole matrices again, in a type; the rest is as it was."""

    def one(leaf: Any) -> Any:
        return leaf.whole(dtype) if is_quantised(leaf) else leaf

    return jax.tree.map(one, params, is_leaf=is_quantised)


def is_quantised(leaf: Any) -> bool:
    """Whether a matrix or a table is in few bits."""
    return isinstance(leaf, (QuantisedMatrix, QuantisedTable))


def dims_of(path: str, parameter: Parameter) -> tuple[int, int]:
    """(stacked dims, dims of a matrix's inputs): "o" has heads and a head's elements as inputs."""
    stacked = parameter.dims.startswith("L") + ("E" in parameter.dims)
    return stacked, 2 if path.endswith("attention/o") else 1


def num_bytes(params: Params) -> int:
    """Bytes of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
