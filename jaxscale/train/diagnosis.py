"""Names the first tensor of a step that is not finite."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale import tree
from jaxscale.parallel.region import LossFn, Region
from jaxscale.types import Array, Batch, Params

# Where the backward comes by: sections of the parameter tree, and the parameters of one layer.
SECTIONS = ("head", "final_norm", "layers", "prefix", "embedding")
LAYER = (
    ".*/down(_bias)?", ".*/(up|gate)(_bias)?", ".*/router", ".*/(ffn|moe)/norm/.*", ".*/o(_bias)?", ".*/[qk]_norm/.*",
    ".*/[qkv](_bias)?", ".*/attention/norm/.*",
)  # fmt: skip


def first_non_finite(loss_fn: LossFn, region: Region, params: Params, batch: Batch, key: jax.Array) -> str:
    """Runs one batch again and looks at every named tensor in the order of their making.

    The forward is looked at layer by layer, unrolled and nothing rematerialised, where the loss has a `stack` that can
    be replaced by such a one and there is no pipeline.

    Args:
        loss_fn: under the contract of `train.losses`.
        region: as trained.
        params: as they were before the step.
        batch: the step's batch, on the mesh.
        key: the step's key.
    Returns:
        The path of a parameter, else of a tensor of the forward ("layers/0/q, layer 3 of its stack"), else "loss",
        else of the gradient that the backward makes first, else their norm.
    """
    for path, leaf in tree.flatten(params).items():
        if not bool(jnp.isfinite(leaf).all()):
            return f"parameter {path}"
    if name := _first_of_forward(loss_fn, region, params, batch, key):
        return name
    (loss, *_), gradients = jax.jit(region.gradient(loss_fn))(params, batch, key)
    if not bool(jnp.isfinite(loss)):
        return "loss"
    if name := _first_gradient(gradients, region):
        return name
    if not bool(jnp.isfinite(optax.tree.norm(gradients))):
        return "the gradients' norm, though every gradient is finite"
    return "nothing: this time every tensor was finite"


def _first_of_forward(loss_fn: LossFn, region: Region, params: Params, batch: Batch, key: jax.Array) -> str | None:
    """A tensor of the forward, run as the step runs it: one micro-batch after the other, each with its key."""
    if not hasattr(loss_fn, "stack") or region.schedule is not None:
        return None
    stack = dataclasses.replace(loss_fn.stack, is_scanned=False, remat="none", saved_names=(), offloaded_names=())
    names: list[str] = []
    evaluate = region.evaluate(_count_non_finite(dataclasses.replace(loss_fn, stack=stack), names))
    parts = region.num_microbatches

    @jax.jit
    def count(params: Params, batch: Batch, key: jax.Array, number: int) -> dict[str, Array]:
        rows = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:])[:, number], batch)
        return evaluate(params, rows, jax.random.fold_in(key, number))[2]

    for number in range(parts):
        counts = count(params, batch, key, number)
        for name in names:
            if counts[name] > 0:
                return name if parts == 1 else f"{name}, micro-batch {number}"
    return None


def _count_non_finite(loss_fn: LossFn, names: list[str]) -> LossFn:
    """A loss whose metrics count the non-finite elements of each named tensor; `names` receives their order."""

    def counted(params: Params, batch: Batch, key: jax.Array, *, operations: Any):
        counts: dict[str, Array] = {}

        def mark(name: str, x: Array) -> Array:
            repeats = sum(known.split(",")[0] == name for known in counts)
            counts[f"{name}, layer {repeats} of its stack" if name.startswith("layers") else name] = jnp.sum(
                ~jnp.isfinite(x)
            )
            return x

        def count_tokens(logits: Array, labels: Array) -> tuple[Array, Array]:
            """In place of the loss, in whose loop over chunks `mark` would see no more than a tracer."""
            is_bad = ~jnp.isfinite(logits).all(-1, keepdims=True)
            bad = operations.exit(is_bad.astype(jnp.float32))[..., 0]
            return bad, bad

        watched = dataclasses.replace(operations, mark=mark, token_loss=count_tokens)
        loss, weight, metrics = loss_fn(params, batch, key, operations=watched)
        if "nll" in metrics:
            counts["logits"] = metrics["nll"]
        names[:] = counts
        return loss, weight, counts

    return counted


def _first_gradient(gradients: Any, region: Region) -> str | None:
    """The gradient that the backward makes first of those that are not finite."""

    def is_finite(path: str, leaf: Array) -> Array:
        return jnp.isfinite(leaf).all(tuple(range(path.startswith("layers/"), leaf.ndim)))

    everywhere = NamedSharding(region.mesh, PartitionSpec())
    flags = jax.jit(lambda g: tree.map_with_path(is_finite, g), out_shardings=everywhere)(gradients)
    order = region.specs.layout.order  # a pipeline stores its layers permuted and padded
    bad = [
        (path, int(order[row]) if path.startswith("layers/") else 0)
        for path, flag in tree.flatten(flags).items()
        for row in np.flatnonzero(~np.atleast_1d(np.asarray(flag)))
    ]
    if not bad:
        return None
    path, layer = min(bad, key=_backward_order)
    return f"gradient of {path}" + (f", layer {layer} of its stack" if path.startswith("layers/") else "")


def _backward_order(gradient: tuple[str, int]) -> tuple[int, ...]:
    path, layer = gradient
    section, number = path.split("/")[:2]
    position = int(number) if section in ("layers", "prefix") else 0
    return SECTIONS.index(section), -layer, -position, *(not re.fullmatch(part, path) for part in LAYER)
