"""Sharding rules: a parameter's dim letters to mesh axes; ZeRO is one more rule."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxscale import tree
from jaxscale.parallel.mesh import DATA, EXPERT, PIPELINE, TENSOR, MeshConfig, nearest_divisors
from jaxscale.parallel.pipeline.stages import StageLayout
from jaxscale.types import InputError

AXIS_OF_DIM = {"L": PIPELINE, "E": EXPERT, "N": TENSOR, "K": TENSOR, "F": TENSOR, "V": TENSOR}
NAME_OF_DIM = {
    "E": "num_experts",
    "N": "num_heads",
    "K": "num_kv_heads",
    "F": "ffn_dim",
    "V": "vocab_size",
}
ROUTER_DIMS = "DE"  # a router scores all experts on every device


@dataclasses.dataclass(frozen=True)
class Specs:
    """PartitionSpecs of the parameter tree in its roles.

    A dim's entry names its axes in the order in which they cut it: the tensor axes of the model,
    then ZeRO's, then the pipeline's; what was cut last is gathered first.

    Args:
        dims: dim letters of each leaf.
        layout: which periods of the layer stack each pipeline stage stores.
        parameters: as stored between steps.
        held: as a pipeline stage holds them during a step: the parameters that are in no layer come
            together from all stages, which store a share each.
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


def make_specs(table: Any, config: MeshConfig) -> Specs:
    """Applies the rules to a parameter table.

    Args:
        table: tree whose leaves have `dims` (letters) and `shape`.
        config: the mesh.
    Raises:
        InputError: a sharded dim does not divide its axis, with the equation.
    """
    flat = tree.flatten(table)
    for path, entry in flat.items():
        _check_divides(path, entry, config)
    num_periods = next(entry.shape[0] for entry in flat.values() if entry.dims.startswith("L"))
    dense = jax.tree.map(lambda entry: _dense_spec(entry, config), table)
    layout = StageLayout(num_periods, config.pipeline, config.num_chunks, config.stage_periods)
    # Where layers are gathered one by one each device must have a share of each; a padded stack is
    # longer than its dim.
    cuts_layers = config.zero < 3 and layout.is_identity
    zero = jax.tree.map(
        lambda entry, spec: _zero_spec(entry, spec, config, cuts_layers), table, dense
    )

    def stored(level: int) -> Any:
        specs = zero if config.zero >= level else dense
        return jax.tree.map(lambda entry, spec: _stage_spec(entry, spec, config), table, specs)

    return Specs(
        dims=jax.tree.map(lambda entry: entry.dims, table),
        layout=layout,
        parameters=stored(3),
        held=zero if config.zero >= 3 else dense,
        gradients=stored(2),
        optimizer=stored(1),
        is_optimizer_on_host=config.is_optimizer_on_host,
    )


def mirror(abstract: Any, params: Any, values: Any, default: Any) -> Any:
    """A value for each leaf of a tree that repeats the parameters under longer paths, such as an optimizer state.

    A leaf takes the value of the parameter whose path ends its own and whose shape it has; any
    other the default.

    Args:
        abstract: the optimizer state as shapes.
        params: the parameters as shapes.
        values: one a parameter: PartitionSpecs, dim letters.
        default: for leaves that mirror no parameter.
    """
    flat = {
        path: (leaf.shape, value)
        for (path, leaf), value in zip(
            tree.flatten(params).items(), jax.tree.leaves(values), strict=True
        )
    }

    def one(path: str, leaf: Any) -> Any:
        parts = path.split("/")
        for start in range(len(parts)):
            shape, value = flat.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return value
        return default

    return tree.map_with_path(one, abstract)


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a spec names, in order."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def all_axes_of(spec: PartitionSpec) -> set[str]:
    """The mesh axes that a spec names."""
    return {axis for entry in spec for axis in axes_of(entry)}


def _letters_to_axes(dims: str, config: MeshConfig) -> list[str | None]:
    """The axis of each dim before ZeRO."""
    axes = [AXIS_OF_DIM.get(letter) for letter in dims]
    if dims.endswith(ROUTER_DIMS):
        axes[-1] = None
    elif (
        "E" in dims and config.expert_axis == TENSOR
    ):  # whole experts: their width is not cut as well
        axes = [{EXPERT: TENSOR, TENSOR: None}.get(axis, axis) for axis in axes]
    return axes


def _dense_spec(entry: Any, config: MeshConfig) -> PartitionSpec:
    return PartitionSpec(*_letters_to_axes(entry.dims, config))


def _zero_spec(
    entry: Any, spec: PartitionSpec, config: MeshConfig, cuts_layers: bool
) -> PartitionSpec:
    """Cuts over ZeRO's axes, or over `data` alone; a leaf with no dim that divides stays whole."""
    axes = tuple(axis for axis in config.zero_axes if getattr(config, axis) > 1) or (DATA,)
    settings = dict(may_share=False, cuts_layers=cuts_layers)
    cut = _cut(entry, spec, axes, config, **settings)
    return _cut(entry, spec, (DATA,), config, **settings) if cut == spec else cut


def _stage_spec(entry: Any, spec: PartitionSpec, config: MeshConfig) -> PartitionSpec:
    """Cuts a parameter that is in no layer over the stages, each of which stores a share."""
    if config.pipeline == 1 or entry.dims.startswith("L"):
        return spec
    return _cut(entry, spec, (PIPELINE,), config, may_share=True, cuts_layers=False)


def _cut(
    entry: Any,
    spec: PartitionSpec,
    axes: tuple[str, ...],
    config: MeshConfig,
    *,
    may_share: bool,
    cuts_layers: bool,
) -> PartitionSpec:
    """Adds `axes` to the outermost dim that divides, a dim that is whole before one that is cut already.

    The outermost, for its shares lie together in memory: those of an inner dim are transposed
    before and after each exchange.
    """
    ways = math.prod(getattr(config, axis) for axis in axes)
    cuts = [math.prod(getattr(config, axis) for axis in axes_of(each)) for each in spec]
    fitting = [
        (cut == 1, -i)
        for i, (size, cut, letter) in enumerate(zip(entry.shape, cuts, entry.dims, strict=True))
        if size // cut % ways == 0 and (cut == 1 or may_share) and (letter != "L" or cuts_layers)
    ]
    if not fitting:
        return spec
    dim = -max(fitting)[1]
    together = axes_of(spec[dim]) + axes
    return PartitionSpec(
        *(spec[:dim]), together if len(together) > 1 else together[0], *(spec[dim + 1 :])
    )


def _check_divides(path: str, entry: Any, config: MeshConfig) -> None:
    for letter, size, axis in zip(
        entry.dims, entry.shape, _letters_to_axes(entry.dims, config), strict=True
    ):
        if letter in NAME_OF_DIM and axis is not None and size % getattr(config, axis):
            name, shards = NAME_OF_DIM[letter], getattr(config, axis)
            raise InputError(
                f"MeshConfig.{axis}",
                shards,
                f"{name} % {axis} == 0 for {path}, but {size} % {shards} = {size % shards}; nearest: "
                + nearest_divisors(size, shards),
            )
