"""Models in few bits as "pack-quantized" folders of compressed-tensors, with their very integers.

A matrix is three tensors there: `weight_packed`, integers from the lowest bits of words of 32 on,
to each of which 2^(bits - 1) is added; `weight_scale` of each output and group of inputs; and
`weight_shape`. Inputs that are no multiple of a group have a shorter group at the end, which
compressed-tensors itself refuses.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale import tree
from jaxscale.checkpoint.safetensors import NewTensor
from jaxscale.checkpoint.source import LazyArray
from jaxscale.convert.places import Layout, Share, plan
from jaxscale.convert.quantised import PackedMatrix, packed
from jaxscale.convert.weights import assembled, family_leaves, filled
from jaxscale.models.config import ModelConfig
from jaxscale.models.quantised import dims_of, is_quantised
from jaxscale.ops.quantised import GROUP, Integers, QuantisedTable, from_integers
from jaxscale.types import InputError, Params


def packed_tensors(
    config: ModelConfig,
    layout: Layout,
    params: Params,
    *,
    dtype: np.dtype,
) -> tuple[list[NewTensor], dict[str, Any]]:
    """The tensors of a model in few bits as a family names them, and its `quantization_config`.

    Args:
        config: the model.
        layout: of the family.
        params: the parameter tree, as `models.quantised.quantised` returns it.
        dtype: of what is not in few bits.
    Raises:
        InputError: the family has matrices [in, out], for which the format has no place.
    """
    if layout.is_input_first:
        raise InputError("quantisation", "[in, out]", "a family whose matrices are [out, in]")
    leaves = tree.flatten(params, is_leaf=is_quantised)
    tensors, targets = [], {}
    for name, shares in plan(config, layout).items():
        leaf = leaves[shares[0].leaf]
        if is_quantised(leaf):
            module = name.removesuffix(".weight")
            targets.setdefault(leaf.bits, {})[re.sub(r"\d+", r"\\d+", re.escape(module))] = None
            tensors += _tensors_of(module, shares, leaves, leaf.bits)
        else:
            make = functools.partial(assembled, shares, leaves, dtype)
            tensors.append(NewTensor(name, shares[0].tensor_shape, dtype, make))
    return tensors, _quantisation(targets)


def _quantisation(targets: Mapping[int, Mapping[str, None]]) -> dict[str, Any]:
    """The `quantization_config`: a group of modules for each number of bits."""
    groups = {}
    for number, (bits, patterns) in enumerate(sorted(targets.items())):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP,
        }
        groups[f"group_{number}"] = {
            "targets": [f"re:{pattern}$" for pattern in patterns],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def _tensors_of(
    module: str,
    shares: Sequence[Share],
    leaves: Mapping[str, Any],
    bits: int,
) -> Iterator[NewTensor]:
    """The three tensors of a module."""
    outputs, inputs = shares[0].tensor_shape
    scale_dtype = np.dtype(leaves[shares[0].leaf].dtype)

    def words() -> np.ndarray:
        return packed(_integers(shares, leaves).values, bits)

    def scales() -> np.ndarray:
        return _integers(shares, leaves).scales

    num_words, num_groups = math.ceil(inputs * bits / 32), math.ceil(inputs / GROUP)
    yield NewTensor(f"{module}.weight_packed", (outputs, num_words), np.dtype(np.int32), words)
    yield NewTensor(f"{module}.weight_scale", (outputs, num_groups), scale_dtype, scales)
    shape = np.array([outputs, inputs], np.int64)
    yield NewTensor(f"{module}.weight_shape", (2,), shape.dtype, lambda: shape)


def _integers(shares: Sequence[Share], leaves: Mapping[str, Any]) -> Integers:
    """A tensor's integers [out, in] and scales [out, groups]."""
    shape = shares[0].tensor_shape
    values = np.zeros(shape, np.int8)
    scales = np.zeros(shape, leaves[shares[0].leaf].dtype)  # of each input, to be cut as they are
    for share in shares:
        leaf = leaves[share.leaf]
        is_table = isinstance(leaf, QuantisedTable)
        found = (leaf.matrix if is_table else leaf).integers(share.index)
        box = np.asarray(found.values)
        depth = math.prod(box.shape) // math.prod(found.scales.shape[1:])
        by_input = np.repeat(np.asarray(found.scales), GROUP, 0)[:depth].reshape(box.shape)
        for part, tensor in ((box, values), (by_input, scales)):
            share.write(part.T if is_table else part, tensor)
    return Integers(values, scales[:, ::GROUP])


def import_packed(
    config: ModelConfig,
    layout: Layout,
    leaves: Mapping[str, LazyArray],
    *,
    stored: Params,
    where: str,
) -> Params:
    """The parameters of a source, in which matrices keep the integers that they have there.

    Args and Raises as `weights.import_params`.
    """
    found = family_leaves(config, layout, leaves, where=where)

    def leaf(path: str, target: jax.ShapeDtypeStruct) -> Any:
        shares = found[path].shares
        if not all(is_packed(leaves[share.tensor]) for share in shares):
            return filled(target, shares, leaves)
        parts = [_matrix(path, share, leaves[share.tensor]) for share in shares]
        lead = target.shape[: len(shares[0].index)]
        return jax.tree.map(lambda *each: jnp.stack(each).reshape(*lead, *each[0].shape), *parts)

    return tree.map_with_path(leaf, stored)


def is_packed(leaf: LazyArray) -> bool:
    """Whether the integers of a tensor are such as ours: symmetric, in groups of GROUP inputs."""
    return isinstance(leaf, PackedMatrix) and leaf.integers is not None


def _matrix(path: str, share: Share, tensor: PackedMatrix) -> Any:
    """The matrix or table in few bits of a share."""
    integers = tensor.integers(tensor.values())
    by_input = np.repeat(integers.scales, GROUP, 1)[:, : tensor.shape[1]]
    values, scales = share.read(integers.values), share.read(by_input)
    is_table = share.groups[0] == "V"
    if is_table:
        values, scales = values.T, scales.T
    num_inputs = 1 if is_table else dims_of(path, share.parameter)[1]
    depth = math.prod(values.shape[:num_inputs])
    of_groups = scales.reshape(depth, *values.shape[num_inputs:])[::GROUP]
    found = from_integers(Integers(values, of_groups), num_inputs, tensor.bits)
    return QuantisedTable(found) if is_table else found
