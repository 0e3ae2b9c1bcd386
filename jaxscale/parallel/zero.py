"""ZeRO over `data`: parameters gathered where they are used, gradients reduced once.

Source: Rajbhandari et al. 2019 (arXiv 1910.02054), section 5.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from jaxscale import tree
from jaxscale.parallel.mesh import AXES, DATA
from jaxscale.parallel.rules import Specs, axes_of, zero_dim
from jaxscale.types import Array


def make_gather(specs: Specs, reduction: str) -> Any:
    """The `gather` operation: all-gathers the ZeRO-3 leaves of one section.

    Args:
        specs: of the whole parameter tree.
        reduction: type in which the transposed reduce-scatter sums.
    """
    flat = dict(
        zip(
            tree.flatten(specs.dims),
            zip(jax.tree.leaves(specs.dims), jax.tree.leaves(specs.parameters), strict=True),
            strict=True,
        )
    )

    def gather(section: str, params: Any) -> Any:
        def one(path: str, leaf: Array) -> Array:
            dims, spec = flat[f"{section}/{path}"]
            dim = zero_dim(spec)
            return leaf if dim is None else _gather(leaf, dim - dims.startswith("L"), reduction)

        return tree.map_with_path(one, params)

    return gather


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, dim: int, reduction: str) -> Array:
    return lax.all_gather(x, DATA, axis=dim, tiled=True)


def _scatter(dim: int, reduction: str, _: None, cotangent: Array) -> tuple[Array]:
    summed = lax.psum_scatter(cotangent.astype(reduction), DATA, scatter_dimension=dim, tiled=True)
    return (summed.astype(cotangent.dtype),)


_gather.defvjp(lambda x, dim, reduction: (_gather(x, dim, reduction), None), _scatter)


def reduce_gradient(gradient: Array, stored: PartitionSpec, wanted: PartitionSpec) -> Array:
    """Sums a local gradient over the devices that hold the parameter.

    Every token's loss is counted on one device, so the gradient is the sum over all axes absent from the spec; over
    `data` as a reduce-scatter where the gradient is wanted sharded.

    Args:
        gradient: local, shaped as the parameter is stored.
        stored: spec of the parameter.
        wanted: spec of the gradient.
    """
    dim = zero_dim(wanted)
    if dim is not None and zero_dim(stored) is None:
        gradient = lax.psum_scatter(gradient, DATA, scatter_dimension=dim, tiled=True)
    absent = tuple(axis for axis in AXES if axis not in axes_of(wanted))
    return lax.psum(gradient, absent)
