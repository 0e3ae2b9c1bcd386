"""Names the first tensor of a step that is not finite."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxscale import tree
from jaxscale.parallel.region import Region
from jaxscale.train.losses import NextTokenLoss
from jaxscale.types import Array, Batch, Params


def first_non_finite(loss_fn: NextTokenLoss, region: Region, params: Params, batch: Batch, key: jax.Array) -> str:
    """Runs one batch again, layers unrolled and nothing rematerialised, and looks at every named tensor in order.

    Args:
        loss_fn: the loss, whose stack is replaced by an unrolled one.
        region: as trained.
        params: as they were before the step.
        batch: the step's batch, on the mesh.
        key: the step's key.
    Returns:
        The path of a parameter, else of a tensor of the forward ("layers/0/q, layer 3 of its stack"), else "loss",
        else of a gradient, else their norm.
    """
    for path, leaf in tree.flatten(params).items():
        if not bool(jnp.isfinite(leaf).all()):
            return f"parameter {path}"
    stack = dataclasses.replace(loss_fn.stack, is_scanned=False, remat="none", saved_names=(), offloaded_names=())
    unrolled = dataclasses.replace(loss_fn, stack=stack)
    names: list[str] = []
    counts = jax.jit(region.evaluate(_count_non_finite(unrolled, names)))(params, batch, key)[2]
    for name in names:
        if counts[name] > 0:
            return name
    (loss, *_), gradients = jax.jit(region.gradient(loss_fn))(params, batch, key)
    if not bool(jnp.isfinite(loss)):
        return "loss"
    for path, leaf in tree.flatten(gradients).items():
        if not bool(jnp.isfinite(leaf).all()):
            return f"gradient of {path}"
    if not bool(jnp.isfinite(optax.tree.norm(gradients))):
        return "the gradients' norm, though every gradient is finite"
    return "nothing: this time every tensor was finite"


def _count_non_finite(loss_fn: NextTokenLoss, names: list[str]) -> Any:
    """A loss whose metrics count the non-finite elements of each named tensor; `names` receives their order."""

    def counted(params: Params, batch: Batch, key: jax.Array, *, operations: Any):
        counts: dict[str, Array] = {}

        def mark(name: str, x: Array) -> Array:
            repeats = sum(known.split(",")[0] == name for known in counts)
            counts[f"{name}, layer {repeats} of its stack" if name.startswith("layers") else name] = jnp.sum(
                ~jnp.isfinite(x)
            )
            return x

        sums = loss_fn(params, batch, key, operations=dataclasses.replace(operations, mark=mark))
        names[:] = counts
        return sums[0], sums[1], counts

    return counted
