"""ZeRO over `data`: parameters gathered where they are used, gradients reduced once.

Source: Rajbhandari et al. 2019 (arXiv 1910.02054), section 5.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from jaxscale import tree
from jaxscale.parallel.mesh import AXES, DATA, PIPELINE, SEQUENCE
from jaxscale.parallel.rules import Specs, all_axes_of, axes_of
from jaxscale.types import Array


def make_gather(specs: Specs, reduction: str) -> Any:
    """The `gather` operation: all-gathers the ZeRO-3 leaves of one section.

    Args:
        specs: of the whole parameter tree.
        reduction: type in which the transposed reduce-scatter sums.
    """
    dims, held = (jax.tree.leaves(each) for each in (specs.dims, specs.held))
    flat = dict(zip(tree.flatten(specs.dims), zip(dims, held, strict=True), strict=True))

    def gather(section: str, params: Any) -> Any:
        def one(path: str, leaf: Array) -> Array:
            dims, spec = flat[f"{section}/{path}"]
            for dim, entry in enumerate(spec):
                axes = tuple(axis for axis in axes_of(entry) if axis in (DATA, SEQUENCE))
                if axes:
                    leaf = _gather(leaf, dim - dims.startswith("L"), axes, reduction)
            return leaf

        return tree.map_with_path(one, params)

    return gather


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: Array, dim: int, axes: tuple[str, ...], reduction: str) -> Array:
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def _scatter(
    dim: int, axes: tuple[str, ...], reduction: str, _: None, cotangent: Array
) -> tuple[Array]:
    summed = lax.psum_scatter(cotangent.astype(reduction), axes, scatter_dimension=dim, tiled=True)
    return (summed.astype(cotangent.dtype),)


_gather.defvjp(lambda x, dim, axes, reduction: (_gather(x, dim, axes, reduction), None), _scatter)


def hold(params: Any, specs: Specs) -> Any:
    """What a stage holds during a step: parameters that are in no layer, gathered from the shares of all stages."""

    def one(leaf: Array, stored: PartitionSpec, held: PartitionSpec) -> Array:
        for dim, (entry, kept) in enumerate(zip(stored, held, strict=True)):
            if PIPELINE in axes_of(entry) and PIPELINE not in axes_of(kept):
                leaf = lax.all_gather(leaf, PIPELINE, axis=dim, tiled=True)
        return leaf

    return jax.tree.map(one, params, specs.parameters, specs.held)


def reduce_gradient(gradient: Array, held: PartitionSpec, wanted: PartitionSpec) -> Array:
    """Sums a local gradient over the devices that hold the parameter.

    Every token's loss is counted on one device, so the gradient is the sum over all axes absent
    from the spec; over axes that cut the gradient further than the parameter, as a reduce-scatter.

    Args:
        gradient: local, shaped as the parameter is held during the step.
        held: spec of the parameter.
        wanted: spec of the gradient.
    """
    for dim, (entry, whole) in enumerate(zip(wanted, held, strict=True)):
        axes = axes_of(entry)[len(axes_of(whole)) :]
        if axes:
            gradient = lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True)
    absent = tuple(axis for axis in AXES if axis not in all_axes_of(wanted))
    return lax.psum(gradient, absent)
