"""Sharding rules: a parameter's dim letters to mesh axes; ZeRO is one more rule."""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxscale import tree
from jaxscale.parallel.mesh import DATA, EXPERT, PIPELINE, TENSOR, MeshConfig
from jaxscale.types import InputError

AXIS_OF_DIM = {"L": PIPELINE, "E": EXPERT, "N": TENSOR, "K": TENSOR, "F": TENSOR, "V": TENSOR}
NAME_OF_DIM = {
    "L": "layers", "E": "num_experts", "N": "num_heads", "K": "num_kv_heads", "F": "ffn_dim", "V": "vocab_size"
}  # fmt: skip
ROUTER_DIMS = "DE"  # a router scores all experts on every device


@dataclasses.dataclass(frozen=True)
class Specs:
    """PartitionSpecs of the parameter tree in its three roles.

    Args:
        dims: dim letters of each leaf.
        parameters: as stored between steps.
        gradients: as they leave the manual region.
        optimizer: of optimizer leaves that mirror a parameter.
    """

    dims: Any
    parameters: Any
    gradients: Any
    optimizer: Any


def make_specs(table: Any, config: MeshConfig) -> Specs:
    """Applies the rules to a parameter table.

    Args:
        table: tree whose leaves have `dims` (letters) and `shape`.
        config: the mesh; `zero` chooses what is sharded over `data`.
    Raises:
        InputError: a sharded dim does not divide its axis, with the equation.
    """
    flat = tree.flatten(table)
    for path, entry in flat.items():
        _check_divides(path, entry, config)
    dense = jax.tree.map(_dense_spec, table)
    zero = jax.tree.map(lambda entry: _zero_spec(entry, config), table)
    return Specs(
        dims=jax.tree.map(lambda entry: entry.dims, table),
        parameters=zero if config.zero >= 3 else dense,
        gradients=zero if config.zero >= 2 else dense,
        optimizer=zero if config.zero >= 1 else dense,
    )


def mirror_specs(abstract: Any, params: Any, specs: Any) -> Any:
    """Specs for a tree that repeats the parameters under longer paths, such as an optimizer state.

    A leaf takes the spec of the parameter whose path ends its own and whose shape it has; any other is replicated.

    Args:
        abstract: the optimizer state as shapes.
        params: the parameters as shapes.
        specs: PartitionSpecs of the parameters.
    """
    flat = {
        path: (leaf.shape, spec)
        for (path, leaf), spec in zip(tree.flatten(params).items(), jax.tree.leaves(specs), strict=True)
    }

    def one(path: str, leaf: Any) -> PartitionSpec:
        parts = path.split("/")
        for start in range(len(parts)):
            shape, spec = flat.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return spec
        return PartitionSpec()

    return tree.map_with_path(one, abstract)


def axes_of(spec: PartitionSpec) -> set[str]:
    """The mesh axes a spec names."""
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec if entry is not None]
    return {axis for entry in entries for axis in entry}


def zero_dim(spec: PartitionSpec) -> int | None:
    """The dim that ZeRO sharded over `data`, if any."""
    return next((i for i, entry in enumerate(spec) if entry == DATA), None)


def _sharded_letters(entry: Any) -> str:
    return entry.dims.replace("E", "") if entry.dims.endswith(ROUTER_DIMS) else entry.dims


def _dense_spec(entry: Any) -> PartitionSpec:
    letters = _sharded_letters(entry)
    return PartitionSpec(*(AXIS_OF_DIM.get(d) if d in letters else None for d in entry.dims))


def _zero_spec(entry: Any, config: MeshConfig) -> PartitionSpec:
    """Adds `data` on the largest dim that is free and divides; a leaf that has none stays whole."""
    spec = _dense_spec(entry)
    free = [
        (size, -i)
        for i, (size, letter, axis) in enumerate(zip(entry.shape, entry.dims, spec, strict=True))
        if axis is None and letter != "L" and size % config.data == 0
    ]
    if not free:
        return spec
    dim = -max(free)[1]
    return PartitionSpec(*(DATA if i == dim else axis for i, axis in enumerate(spec)))


def _check_divides(path: str, entry: Any, config: MeshConfig) -> None:
    for letter, size in zip(entry.dims, entry.shape, strict=True):
        axis = AXIS_OF_DIM.get(letter) if letter in _sharded_letters(entry) else None
        if axis is not None and size % getattr(config, axis):
            name, shards = NAME_OF_DIM[letter], getattr(config, axis)
            raise InputError(
                f"MeshConfig.{axis}",
                shards,
                f"{name} % {axis} == 0 for {path}, but {size} % {shards} = {size % shards}",
            )
