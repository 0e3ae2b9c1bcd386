"""Sharding rules: a parameter's dim letters to mesh axes; ZeRO is one more rule."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxscale import tree
from jaxscale.parallel.mesh import DATA, EXPERT, PIPELINE, TENSOR, MeshConfig, nearest_divisors
from jaxscale.parallel.pipeline.stages import StageLayout
from jaxscale.types import InputError, Role

AXIS_OF_DIM = {
    "L": PIPELINE,
    "E": EXPERT,
    "N": TENSOR,
    "K": TENSOR,
    "F": TENSOR,
    "V": TENSOR,
}
NAME_OF_DIM = {
    "E": "num_experts",
    "N": "num_heads",
    "K": "num_kv_heads",
    "F": "ffn_dim",
    "V": "vocab_size",
}


@dataclasses.dataclass(frozen=True)
class Specs:
    """PartitionSpecs of the parameter tree in its roles.

    A dim's entry names its axes in the order in which they shard it: the tensor axes of the model,
    then ZeRO's, then the pipeline's. The axis that shards a dim last is gathered first.

    Args:
        dims: dim letters of each leaf.
        layout: which periods of the layer stack each pipeline stage stores.
        parameters: as stored between steps.
        held: as a pipeline stage holds them during a step. Parameters that are in no layer are
            gathered from all stages, which store a share each.
        gradients: as they leave the manual region.
        optimizer: of optimizer leaves that mirror a parameter.
        is_optimizer_on_host: whether those rest in host memory between updates.
    """

    dims: Any
    layout: StageLayout
    parameters: Any
    held: Any
    gradients: Any
    optimizer: Any
    is_optimizer_on_host: bool = False


def is_router(entry: Any) -> bool:
    """Whether an entry of the parameter table is a router's matrix [.., D, E]."""
    return entry.role == Role.ROUTER


def make_specs(table: Any, config: MeshConfig) -> Specs:
    """Applies the rules to a parameter table.

    Args:
        table: tree whose leaves have `dims` (letters), `shape`, `role` and `is_stacked`.
        config: the mesh.
    Raises:
        InputError: a sharded dim does not divide its axis, with the equation.
    """
    flat = tree.flatten(table)
    for path, entry in flat.items():
        _check_divides(path, entry, config)
    stacked = (entry for entry in flat.values() if entry.is_stacked)
    # A model without a stack of layers has nothing for the stages of a pipeline to share.
    num_periods = next((entry.shape[0] for entry in stacked), 1)
    layout = StageLayout(num_periods, config.pipeline, config.num_chunks, config.stage_periods)
    # Whether ZeRO may give each device whole layers instead of a share of every layer. Not under
    # ZeRO-3, which gathers one layer at a time from all devices. Not where a pipeline pads the
    # stack: then it has more rows than the table says, by whose sizes shares are counted.
    shards_layers = config.zero < 3 and layout.is_identity

    def zero_spec(entry: Any, spec: PartitionSpec) -> PartitionSpec:
        return _zero_spec(entry, spec, config, shards_layers)

    model = jax.tree.map(lambda entry: _model_spec(entry, config), table)
    zero = jax.tree.map(zero_spec, table, model)

    def stored(level: int) -> Any:
        """Specs between steps of what ZeRO shards from this level on."""
        specs = zero if config.zero >= level else model
        return jax.tree.map(lambda entry, spec: _stage_spec(entry, spec, config), table, specs)

    return Specs(
        dims=jax.tree.map(lambda entry: entry.dims, table),
        layout=layout,
        parameters=stored(3),
        held=zero if config.zero >= 3 else model,
        gradients=stored(2),
        optimizer=stored(1),
        is_optimizer_on_host=config.is_optimizer_on_host,
    )


def mirror(abstract: Any, params: Any, values: Any, default: Any) -> Any:
    """A value for each leaf of a tree that repeats the parameters, such as an optimizer state.

    Such a tree has the parameters under longer paths. A leaf takes the value of the parameter whose
    path ends its own and whose shape it has, but for a last dim of 1, which no axis shards; any
    other leaf takes the default.

    Args:
        abstract: the optimizer state as shapes.
        params: the parameters as shapes.
        values: one a parameter: PartitionSpecs, dim letters.
        default: for leaves that mirror no parameter.
    """
    flat_params = tree.flatten(params)
    flat_values = jax.tree.leaves(values)
    by_path = {
        path: (leaf.shape, value)
        for (path, leaf), value in zip(flat_params.items(), flat_values, strict=True)
    }

    def one(path: str, leaf: Any) -> Any:
        parts = path.split("/")
        for start in range(len(parts)):
            end_of_path = "/".join(parts[start:])
            shape, value = by_path.get(end_of_path, (None, None))
            if shape == leaf.shape:
                return value
            if shape and (*shape[:-1], 1) == leaf.shape:
                is_spec = isinstance(value, PartitionSpec)
                return PartitionSpec(*value[: len(shape) - 1]) if is_spec else value
        return default

    return tree.map_with_path(one, abstract)


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a spec names, in order."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def all_axes_of(spec: PartitionSpec) -> set[str]:
    """The mesh axes that a spec names."""
    return {axis for entry in spec for axis in axes_of(entry)}


def _model_axes(entry: Any, config: MeshConfig) -> list[str | None]:
    """The axis of each dim before ZeRO."""
    axes = [AXIS_OF_DIM.get(letter) for letter in entry.dims]
    for dim, (letter, size) in enumerate(zip(entry.dims, entry.shape, strict=True)):
        if letter == "K" and size < config.tensor and config.tensor % size == 0:
            # More members than kv heads: each holds all of them, see `tensor.kv_heads`.
            axes[dim] = None
    if is_router(entry):
        # A router scores all experts on every device.
        axes[-1] = None
    elif "E" in entry.dims and config.expert_axis == TENSOR:
        # Each tensor rank has whole experts, so their width is not sharded as well.
        changed = {EXPERT: TENSOR, TENSOR: None}
        axes = [changed.get(axis, axis) for axis in axes]
    return axes


def _model_spec(entry: Any, config: MeshConfig) -> PartitionSpec:
    return PartitionSpec(*_model_axes(entry, config))


def _zero_spec(
    entry: Any,
    spec: PartitionSpec,
    config: MeshConfig,
    shards_layers: bool,
) -> PartitionSpec:
    """Shards over ZeRO's axes, or `data` alone; a leaf with no dim that divides stays whole."""
    axes = tuple(axis for axis in config.zero_axes if getattr(config, axis) > 1)
    for each in (axes or (DATA,), (DATA,)):
        sharded = _shard(
            entry,
            spec,
            each,
            config,
            may_share=False,
            shards_layers=shards_layers,
        )
        if sharded != spec:
            return sharded
    return spec


def _stage_spec(
    entry: Any,
    spec: PartitionSpec,
    config: MeshConfig,
) -> PartitionSpec:
    """Shards a parameter that is in no layer over the stages, each of which stores a share."""
    if config.pipeline == 1 or entry.is_stacked:
        return spec
    return _shard(
        entry,
        spec,
        (PIPELINE,),
        config,
        may_share=True,
        shards_layers=False,
    )


def _shard(
    entry: Any,
    spec: PartitionSpec,
    axes: tuple[str, ...],
    config: MeshConfig,
    *,
    may_share: bool,
    shards_layers: bool,
) -> PartitionSpec:
    """Adds `axes` to the outermost dim that divides; unchanged if there is none.

    A dim that no axis shards comes before one that is sharded already. The outermost dim is best
    because its shares lie together in memory; those of an inner dim are transposed before and after
    each exchange.

    Args:
        entry: of the parameter table.
        spec: to add to.
        axes: to add, all to one dim.
        config: the mesh.
        may_share: whether a dim that is sharded already will do.
        shards_layers: whether the dim of layers will do.
    """
    num_shards = _num_shards(axes, config)
    fitting = []
    for dim, (letter, size) in enumerate(zip(entry.dims, entry.shape, strict=True)):
        num_before = _num_shards(axes_of(spec[dim]), config)
        is_whole = num_before == 1
        divides = size // num_before % num_shards == 0
        is_allowed = (is_whole or may_share) and (letter != "L" or shards_layers)
        if divides and is_allowed:
            fitting.append((not is_whole, dim))
    if not fitting:
        return spec
    _, dim = min(fitting)
    entries = list(spec)
    together = axes_of(spec[dim]) + axes
    entries[dim] = together if len(together) > 1 else together[0]
    return PartitionSpec(*entries)


def _num_shards(axes: tuple[str, ...], config: MeshConfig) -> int:
    """Parts that `axes` cut a dim into."""
    return math.prod(getattr(config, axis) for axis in axes)


def _check_divides(path: str, entry: Any, config: MeshConfig) -> None:
    """Raises InputError unless each of the model's sharded dims divides over its axis."""
    axes = _model_axes(entry, config)
    for letter, size, axis in zip(entry.dims, entry.shape, axes, strict=True):
        if axis is None or letter not in NAME_OF_DIM:
            continue
        num_shards = getattr(config, axis)
        if rest := size % num_shards:
            equation = f"{NAME_OF_DIM[letter]} % {axis} == 0 for {path}"
            here = f"but {size} % {num_shards} = {rest}"
            nearest = nearest_divisors(size, num_shards)
            expected = f"{equation}, {here}; nearest: {nearest}"
            raise InputError(f"MeshConfig.{axis}", num_shards, expected)
