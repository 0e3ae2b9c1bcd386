"""Which axes of a `shard_map` the arrays of a computation vary over."""

from typing import Any

import jax
from jax import Array, lax


def alike(arrays: Any) -> Any:
    """The arrays, each varying over all axes of a `shard_map` over which one of them does.

    So the gradient of what several devices share, as all shards of rows share the pair bias, is
    summed over them. Without `check_vma` no axis is known here, and the caller sums.
    """

    def varying(x: Array) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying

    def vary(x: Array) -> Array:
        missing = tuple(sorted(axes - varying(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    axes = frozenset().union(*map(varying, jax.tree.leaves(arrays)))

    return jax.tree.map(vary, arrays)
