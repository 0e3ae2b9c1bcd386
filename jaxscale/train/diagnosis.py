"""Names the first tensor of a step that is not finite."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale import tree
from jaxscale.models.execution import Whole
from jaxscale.models.parameters import Table, in_order_of_use
from jaxscale.ops.backends import Operations
from jaxscale.ops.draws import with_token_keys
from jaxscale.ops.loss import Head, unembed
from jaxscale.parallel import tensor
from jaxscale.parallel.region import LossFn
from jaxscale.parallel.sequence.layout import Chunked, Contiguous
from jaxscale.train.setup import Setup
from jaxscale.types import Array, Batch, Params


def first_non_finite(
    setup: Setup,
    params: Params,
    batch: Batch,
    key: jax.Array,
) -> str:
    """Runs one batch again and looks at every named tensor in the order in which they are made.

    The forward is looked at layer by layer, unrolled and with nothing rematerialised, if the loss
    has an `execution` that can be replaced by such a one.

    Args:
        setup: as trained.
        params: as they were before the step.
        batch: the step's batch, on the mesh.
        key: the step's key.
    Returns:
        The path of a parameter, else of a tensor of the forward ("layers/0/q, layer 3 of its
        stack"), else "loss", else of the gradient that the backward makes first, else their norm.
    """
    for path, leaf in tree.flatten(setup.allowed(params)).items():
        if not bool(jnp.isfinite(leaf).all()):
            return f"parameter {path}"
    if name := _first_of_forward(setup, params, batch, key):
        return name
    gradient = jax.jit(setup.region.gradient(setup.loss_fn))
    (loss, *_), gradients = gradient(params, batch, key)
    if not bool(jnp.isfinite(loss)):
        return "loss"
    if name := _first_gradient(gradients, setup):
        return name
    if not bool(jnp.isfinite(optax.tree.norm(gradients))):
        return "the gradients' norm, though every gradient is finite"
    return "nothing: this time every tensor was finite"


def _first_of_forward(
    setup: Setup,
    params: Params,
    batch: Batch,
    key: jax.Array,
) -> str | None:
    """A tensor of the forward, which runs as in the step: a micro-batch at a time, with its key."""
    loss_fn, region = setup.loss_fn, setup.region
    if not hasattr(loss_fn, "execution"):
        return None
    if isinstance(region.token_layout, Chunked):
        region = dataclasses.replace(region, token_layout=Contiguous())  # that of whole layers
    execution = dataclasses.replace(
        loss_fn.execution,
        is_scanned=False,
        remat="none",
        saved_names=(),
        offloaded_names=(),
        strategy=Whole(),
    )
    names: list[str] = []
    counting = _Counting if region.schedule is None else _StagedCounting
    counted = counting(dataclasses.replace(loss_fn, execution=execution), names)
    evaluate = region.evaluate(counted)
    num_parts = region.num_microbatches

    @jax.jit
    def count(
        params: Params,
        batch: Batch,
        key: jax.Array,
        number: int,
    ) -> dict[str, Array]:
        def rows(x: Array) -> Array:
            return x.reshape(-1, num_parts, *x.shape[1:])[:, number]

        microbatch = jax.tree.map(rows, with_token_keys(batch, key))
        _, _, counts = evaluate(params, microbatch, jax.random.fold_in(key, number))
        return counts

    for number in range(num_parts):
        if name := _first_counted(count(params, batch, key, number), names, setup.table):
            return name if num_parts == 1 else f"{name}, micro-batch {number}"
    return None


@dataclasses.dataclass(frozen=True)
class _Counting:
    """A loss whose metrics count the non-finite elements of each named tensor, by period.

    Args:
        loss: as trained, its stack unrolled.
        names: receives the tensors' names, in the order in which a period makes them.
    """

    loss: LossFn
    names: list[str]

    def __call__(
        self,
        params: Params,
        batch: Batch,
        key: jax.Array,
        *,
        operations: Operations,
    ):
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

    def start(
        self,
        params: Params,
        batch: Batch,
        *,
        operations: Operations,
    ) -> Array:
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
        """Period by period: in the branch that skips padding, names would see tracers only."""
        watched, counts = _watch(operations)
        num_periods = len(jax.tree.leaves(layers)[0])
        is_real = jnp.ones(num_periods, bool) if is_real is None else is_real
        for i, real in enumerate(is_real):
            period = jax.tree.map(lambda leaf: leaf[i : i + 1], layers)  # noqa: B023
            y, *_ = self.loss.body(period, x, batch, number[i : i + 1], operations=watched)
            x = jnp.where(real, y, x)
        found = self._counts(counts, {})
        return x, jnp.zeros(()), {name: each * is_real for name, each in found.items()}

    def finish(
        self,
        params: Params,
        x: Array,
        batch: Batch,
        *,
        operations: Operations,
    ):
        """As the loss's; counts for `start` too, whose parameters every stage holds."""
        watched, counts = _watch(operations)
        self.loss.start(params, batch, operations=watched)
        loss, weight, metrics = self.loss.finish(params, x, batch, operations=watched)
        return loss, weight, self._counts(counts, metrics)


def _watch(operations: Operations) -> tuple[Operations, dict[str, list[Array]]]:
    """Operations that count the non-finite elements of each named tensor, and the counts so far."""
    counts: dict[str, list[Array]] = {}

    def name(path: str, x: Array) -> Array:
        counts.setdefault(path, []).append(jnp.sum(~jnp.isfinite(x)))
        return x

    def count_tokens(
        h: Array,
        head: Array | Head,
        labels: Array,
        softcap: float | None,
    ) -> tuple[Array, Array]:
        """In place of the loss, in whose loop over chunks `name` would see tracers only."""
        if isinstance(head, Head):  # the logit of a forbidden word is no fault
            head = head._replace(bias=jnp.where(head.bias == -jnp.inf, 0, head.bias))
        is_bad = ~jnp.isfinite(unembed(h, head, softcap)).all(-1, keepdims=True)
        sums = operations.collectives.reduce_scatter_tokens(is_bad.astype(jnp.float32))
        return sums[..., 0], sums[..., 0]

    # All rows at once, for otherwise a name would stand for several tensors of a layer.
    collectives = dataclasses.replace(
        operations.collectives, column_then_row=tensor.column_then_row
    )
    backends = dataclasses.replace(operations.backends, name=name, token_loss=count_tokens)
    return Operations(collectives, backends), counts


def _first_counted(counts: dict[str, Array], names: list[str], table: Table) -> str | None:
    """The first of the tensors that are not finite: before the stack, in a period, or after it."""
    sections = list(table)

    def place(name: str) -> int:
        section = _section(name)
        return sections.index(section) if section in sections else len(sections)

    bad = [
        (place(name), period, number)
        for number, name in enumerate(names)
        for period in np.flatnonzero(counts[name])
    ]
    if not bad:
        return None
    _, period, number = min(bad)
    return names[number] + _layer_text(names[number], period, table)


def _first_gradient(gradients: Any, setup: Setup) -> str | None:
    """The gradient that the backward makes first of those that are not finite."""

    entries = dict(in_order_of_use(setup.table))

    def is_finite(path: str, leaf: Array) -> Array:
        first = int(entries[path].is_stacked)
        return jnp.isfinite(leaf).all(tuple(range(first, leaf.ndim)))

    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    look = jax.jit(lambda g: tree.map_with_path(is_finite, g), out_shardings=everywhere)
    order = setup.region.specs.layout.order  # a pipeline stores its layers permuted and padded
    bad = [
        (path, int(order[row]) if entries[path].is_stacked else 0)
        for path, flag in tree.flatten(look(gradients)).items()
        for row in np.flatnonzero(~np.atleast_1d(np.asarray(flag)))
    ]
    if not bad:
        return None
    # The backward makes gradients in the opposite order of use: sections, then the layers of a
    # section, then the parameters of a layer.
    used, sections = list(entries), list(setup.table)

    def use(gradient: tuple[str, int]) -> tuple[int, int, int]:
        path, layer = gradient
        return sections.index(_section(path)), layer, used.index(path)

    path, layer = max(bad, key=use)
    return f"gradient of {path}" + _layer_text(path, layer, setup.table)


def _section(path: str) -> str:
    """The part of the parameter table to which a parameter or a named tensor belongs."""
    return path.split(tree.SEPARATOR)[0]


def _layer_text(path: str, layer: int, table: Table) -> str:
    """Which layer is meant, where the section's parameters are stacks of layers."""
    of_section = in_order_of_use(table.get(_section(path), {}))
    is_stacked = any(entry.is_stacked for _, entry in of_section)
    return f", layer {layer} of its stack" if is_stacked else ""
