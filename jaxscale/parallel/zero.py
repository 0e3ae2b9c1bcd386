"""ZeRO over `data`: parameters gathered where they are used, gradients reduced once.

Source: Rajbhandari et al. 2019 (arXiv 1910.02054), section 5.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from jaxscale import tree
from jaxscale.parallel.mesh import AXES, DATA, PIPELINE, SEQUENCE
from jaxscale.parallel.rules import Specs, all_axes_of, axes_of
from jaxscale.types import Array, Params


def make_gather(specs: Specs, reduction: str) -> Callable[[str, Params], Params]:
    """The collective `gather_parameters`: all-gathers the ZeRO-3 leaves of one section.

    Args:
        specs: of the whole parameter tree.
        reduction: type in which the transposed reduce-scatter sums.
    Returns:
        (section, its params as the stage holds them) -> the params whole, but for what other axes
        shard.
    """
    paths = tree.flatten(specs.dims)
    dims = jax.tree.leaves(specs.dims)
    held = jax.tree.leaves(specs.held)
    dims_of = dict(zip(paths, dims, strict=True))
    spec_of = dict(zip(paths, held, strict=True))

    def gather(section: str, params: Params) -> Params:
        def one(path: str, leaf: Array) -> Array:
            whole_path = f"{section}/{path}"
            # The layers are gathered one by one, from leaves without the dim of layers.
            num_missing = dims_of[whole_path].startswith("L")
            for dim, entry in enumerate(spec_of[whole_path]):
                axes = _zero_axes_of(entry)
                if axes:
                    leaf = _gather(leaf, dim - num_missing, axes, reduction)
            return leaf

        return tree.map_with_path(one, params)

    return gather


def _zero_axes_of(entry: Any) -> tuple[str, ...]:
    """The axes in one entry of a spec over which ZeRO shards."""
    return tuple(axis for axis in axes_of(entry) if axis in (DATA, SEQUENCE))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: Array, dim: int, axes: tuple[str, ...], reduction: str) -> Array:
    """All-gather whose transpose sums in the type `reduction`, and rounds the sum once.

    A gradient has its parameter's type; to sum in that type would round at every addition.
    """
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def _gather_forward(
    x: Array,
    dim: int,
    axes: tuple[str, ...],
    reduction: str,
) -> tuple[Array, None]:
    return _gather(x, dim, axes, reduction), None


def _gather_backward(
    dim: int,
    axes: tuple[str, ...],
    reduction: str,
    _: None,
    cotangent: Array,
) -> tuple[Array]:
    wide = cotangent.astype(reduction)
    summed = lax.psum_scatter(wide, axes, scatter_dimension=dim, tiled=True)
    return (summed.astype(cotangent.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def hold(params: Params, specs: Specs) -> Params:
    """The parameters as a pipeline stage holds them during a step.

    Those that are in no layer are stored in shares by all stages, and all-gathered here once.
    """

    def one(leaf: Array, stored: PartitionSpec, held: PartitionSpec) -> Array:
        for dim, (stored_entry, held_entry) in enumerate(zip(stored, held, strict=True)):
            is_stored_in_shares = PIPELINE in axes_of(stored_entry)
            is_held_in_shares = PIPELINE in axes_of(held_entry)
            if is_stored_in_shares and not is_held_in_shares:
                leaf = lax.all_gather(leaf, PIPELINE, axis=dim, tiled=True)
        return leaf

    return jax.tree.map(one, params, specs.parameters, specs.held)


def reduce_gradient(
    gradient: Array,
    held: PartitionSpec,
    wanted: PartitionSpec,
) -> Array:
    """Sums a local gradient over the devices that hold the parameter.

    Every token's loss is counted on one device, so the gradient is the sum over all axes absent
    from the spec. Over axes that shard the gradient further than the parameter the sum is a
    reduce-scatter.

    Args:
        gradient: local, shaped as the parameter is held during the step.
        held: spec of the parameter.
        wanted: spec of the gradient.
    """
    for dim, (wanted_entry, held_entry) in enumerate(zip(wanted, held, strict=True)):
        num_held = len(axes_of(held_entry))
        further = axes_of(wanted_entry)[num_held:]
        if further:
            gradient = lax.psum_scatter(gradient, further, scatter_dimension=dim, tiled=True)
    sharded = all_axes_of(wanted)
    absent = tuple(axis for axis in AXES if axis not in sharded)
    return lax.psum(gradient, absent)
