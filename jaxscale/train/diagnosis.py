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
from jaxscale.ops.draws import with_token_keys
from jaxscale.ops.loss import unembed
from jaxscale.ops.operations import Operations
from jaxscale.parallel import tensor
from jaxscale.parallel.region import LossFn, Region
from jaxscale.types import Array, Batch, Params

FORWARD = {"embedding": 0, "prefix": 0, "layers": 1}  # what has another name comes after the stack
# Where the backward comes by: sections of the parameter tree, and the parameters of one layer.
SECTIONS = ("head", "final_norm", "layers", "prefix", "embedding")
LAYER = (
    ".*/down(_bias)?",
    ".*/(up|gate)(_bias)?",
    ".*/(router|omega)",
    ".*/(ffn|moe)/norm/.*",
    ".*/o(_bias)?",
    ".*/[qk]_norm/.*",
    ".*/[qkv](_bias)?",
    ".*/attention/norm/.*",
)


def first_non_finite(
    loss_fn: LossFn, region: Region, params: Params, batch: Batch, key: jax.Array
) -> str:
    """Runs one batch again and looks at every named tensor in the order of their making.

    The forward is looked at layer by layer, unrolled and nothing rematerialised, where the loss has
    a `stack` that can be replaced by such a one.

    Args:
        loss_fn: under the contract of `train.losses`.
        region: as trained.
        params: as they were before the step.
        batch: the step's batch, on the mesh.
        key: the step's key.
    Returns:
        The path of a parameter, else of a tensor of the forward ("layers/0/q, layer 3 of its
        stack"), else "loss", else of the gradient that the backward makes first, else their norm.
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


def _first_of_forward(
    loss_fn: LossFn, region: Region, params: Params, batch: Batch, key: jax.Array
) -> str | None:
    """A tensor of the forward, run as the step runs it: one micro-batch after the other, each with its key."""
    if not hasattr(loss_fn, "stack"):
        return None
    stack = dataclasses.replace(
        loss_fn.stack, is_scanned=False, remat="none", saved_names=(), offloaded_names=()
    )
    names: list[str] = []
    counting = _Counting if region.schedule is None else _StagedCounting
    evaluate = region.evaluate(counting(dataclasses.replace(loss_fn, stack=stack), names))
    parts = region.num_microbatches

    @jax.jit
    def count(params: Params, batch: Batch, key: jax.Array, number: int) -> dict[str, Array]:
        rows = jax.tree.map(
            lambda x: x.reshape(-1, parts, *x.shape[1:])[:, number], with_token_keys(batch, key)
        )
        return evaluate(params, rows, jax.random.fold_in(key, number))[2]

    for number in range(parts):
        if name := _first_counted(count(params, batch, key, number), names):
            return name if parts == 1 else f"{name}, micro-batch {number}"
    return None


@dataclasses.dataclass(frozen=True)
class _Counting:
    """A loss whose metrics count the non-finite elements of each named tensor, by period of the stack.

    Args:
        loss: as trained, its stack unrolled.
        names: receives the tensors' names, in the order of their making within a period.
    """

    loss: LossFn
    names: list[str]

    def __call__(self, params: Params, batch: Batch, key: jax.Array, *, operations: Operations):
        """The loss's own sums and the counts."""
        watched, counts = _watch(operations)
        loss, weight, metrics = self.loss(params, batch, key, operations=watched)
        return loss, weight, self._counts(counts, metrics)

    def _counts(
        self, counts: dict[str, list[Array]], metrics: dict[str, Array]
    ) -> dict[str, Array]:
        if "nll" in metrics:
            counts["logits"] = [metrics["nll"]]
        self.names.extend(name for name in counts if name not in self.names)
        return {name: jnp.stack(each) for name, each in counts.items()}


class _StagedCounting(_Counting):
    """The same in the parts that pipeline stages run, see `parallel.pipeline.loss.StagedLoss`."""

    is_by_period = False

    def start(self, params: Params, batch: Batch, *, operations: Operations) -> Array:
        """As the loss's; it has no metrics, so that `finish` counts."""
        return self.loss.start(params, batch, operations=operations)

    def prepare(self, layers: Params) -> Params:
        """As the loss's."""
        return self.loss.prepare(layers)

    def body(
        self,
        layers: Params,
        x: Array,
        batch: Batch,
        number: Array,
        is_real: Array | None,
        *,
        operations: Operations,
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Period by period: within the branch that skips padding, `mark` would see no more than a tracer."""
        watched, counts = _watch(operations)
        num_periods = len(jax.tree.leaves(layers)[0])
        is_real = jnp.ones(num_periods, bool) if is_real is None else is_real
        for i, real in enumerate(is_real):
            period = jax.tree.map(lambda leaf: leaf[i : i + 1], layers)  # noqa: B023
            x = jnp.where(
                real, self.loss.body(period, x, batch, number[i : i + 1], operations=watched)[0], x
            )
        counts = self._counts(counts, {})
        return x, jnp.zeros(()), {name: each * is_real for name, each in counts.items()}

    def finish(self, params: Params, x: Array, batch: Batch, *, operations: Operations):
        """As the loss's; its counts and those of `start`, whose parameters every stage holds."""
        watched, counts = _watch(operations)
        self.loss.start(params, batch, operations=watched)
        loss, weight, metrics = self.loss.finish(params, x, batch, operations=watched)
        return loss, weight, self._counts(counts, metrics)


def _watch(operations: Operations) -> tuple[Operations, dict[str, list[Array]]]:
    """Operations that count the non-finite elements of each named tensor, and the counts so far."""
    counts: dict[str, list[Array]] = {}

    def mark(name: str, x: Array) -> Array:
        counts.setdefault(name, []).append(jnp.sum(~jnp.isfinite(x)))
        return x

    def count_tokens(
        h: Array, head: Array, labels: Array, softcap: float | None
    ) -> tuple[Array, Array]:
        """In place of the loss, in whose loop over chunks `mark` would see no more than a tracer."""
        is_bad = ~jnp.isfinite(unembed(h, head, softcap)).all(-1, keepdims=True)
        bad = operations.exit(is_bad.astype(jnp.float32))[..., 0]
        return bad, bad

    # All rows at once: else a name would stand for several tensors of a layer.
    return dataclasses.replace(
        operations, mark=mark, token_loss=count_tokens, between=tensor.column_then_row
    ), counts


def _first_counted(counts: dict[str, Array], names: list[str]) -> str | None:
    """The tensor made first of those that are not finite: before the stack, in one of its periods, or after it."""
    bad = [
        (FORWARD.get(name.split("/")[0], 2), period, number)
        for number, name in enumerate(names)
        for period in np.flatnonzero(counts[name])
    ]
    if not bad:
        return None
    _, period, number = min(bad)
    return names[number] + (
        f", layer {period} of its stack" if names[number].startswith("layers/") else ""
    )


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
    return f"gradient of {path}" + (
        f", layer {layer} of its stack" if path.startswith("layers/") else ""
    )


def _backward_order(gradient: tuple[str, int]) -> tuple[int, ...]:
    path, layer = gradient
    section, number = path.split("/")[:2]
    position = int(number) if section in ("layers", "prefix") else 0
    return (
        SECTIONS.index(section),
        -layer,
        -position,
        *(not re.fullmatch(part, path) for part in LAYER),
    )
