"""The parts of a loss that pipeline stages run, and one stage's view of them."""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale import tree
from jaxscale.ops.backends import Operations
from jaxscale.parallel.mesh import PIPELINE
from jaxscale.parallel.pipeline.slots import read_slot
from jaxscale.parallel.pipeline.stages import PADDING, StageLayout
from jaxscale.types import Array, Batch, InputError, Params

Sums = tuple[Array, Array, dict[str, Array]]


@runtime_checkable
class StagedLoss(Protocol):
    """A loss in the three parts that stages run; see `models.losses.NextTokenLoss`."""

    @property
    def is_by_period(self) -> bool:
        """Whether `body` takes a tuple of its periods' trees in place of one tree of stacks.

        The gradient of each period is then an array of its own, to which a matmul can add.
        """

    def start(
        self,
        params: Params,
        batch: Batch,
        *,
        operations: Operations,
    ) -> Array:
        """What comes before the layers: the residual [b, t, D] of this device's tokens."""

    def prepare(self, layers: Params) -> Params:
        """The layers' parameters in the types that `body` takes, converted once a step.

        The gradients that `body` leaves are converted back in the same way.
        """

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
        """Periods of the stack.

        Args:
            layers: their parameters, `prepare`d.
            x: residual [b, t, D].
            batch: a micro-batch.
            number: int [periods], the canonical number of each.
            is_real: bool [periods], false for padding; None if there is none.
            operations: what the mesh injects.
        Returns:
            (residual, sum of their losses, metrics by layer).
        """

    def finish(
        self,
        params: Params,
        x: Array,
        batch: Batch,
        *,
        operations: Operations,
    ) -> Sums:
        """What comes after the layers: the loss as sums."""


def check_staged(loss_fn: Any) -> None:
    """Raises InputError unless stages can run the loss."""
    if not isinstance(loss_fn, StagedLoss):
        expected = (
            "a loss in parts that stages can run (start, prepare, body, finish: see "
            "parallel.pipeline.loss.StagedLoss), or MeshConfig.pipeline = 1"
        )
        raise InputError("loss", loss_fn, expected)


class ChunkInputs(NamedTuple):
    """What `LossParts.body` takes that is not differentiated.

    Args:
        frozen: parameters of the chunk's layers that are not trained; None elsewhere.
        batch: a micro-batch.
        number: int [periods], the canonical number of each period of the chunk.
        is_real: bool [periods], false for padding; None if no chunk is padded.
    """

    frozen: Params
    batch: Batch
    number: Array
    is_real: Array | None


class Shapes(NamedTuple):
    """Shapes of what the parts of a loss return.

    Args:
        x: of the residual.
        loss: of the body's loss.
        by_layer: of its metrics.
        sums: of what `finish` returns.
    """

    x: jax.ShapeDtypeStruct
    loss: jax.ShapeDtypeStruct
    by_layer: dict[str, jax.ShapeDtypeStruct]
    sums: Any


@dataclasses.dataclass(frozen=True)
class LossParts:
    """The parts of a loss as functions of what one stage trains.

    Args:
        loss: what is computed.
        operations: what the mesh injects.
        layout: which periods each stage holds.
        trained: the stage's parameters that are trained; None elsewhere.
        frozen: the others; None elsewhere.
    """

    loss: StagedLoss
    operations: Operations
    layout: StageLayout
    trained: Params
    frozen: Params

    @property
    def rest(self) -> Params:
        """The trained parameters that are in no layer."""
        return _without_layers(self.trained)

    def start(self, rest: Params, batch: Batch) -> Array:
        """What comes before the layers: the residual."""
        params = self._with_frozen(rest)
        return self.loss.start(params, batch, operations=self.operations)

    def finish(self, rest: Params, x: Array, batch: Batch) -> Sums:
        """What comes after the layers: the loss as sums."""
        params = self._with_frozen(rest)
        return self.loss.finish(params, x, batch, operations=self.operations)

    def body(
        self,
        layers: Params,
        x: Array,
        inputs: ChunkInputs,
    ) -> tuple[tuple, dict]:
        """The layers of a chunk: ((residual, sum of their losses), metrics by layer)."""
        y, loss, metrics = self.loss.body(
            tree.merge(layers, inputs.frozen),
            x,
            inputs.batch,
            inputs.number,
            inputs.is_real,
            operations=self.operations,
        )
        return (y, loss), metrics

    def chunk(self, chunk: Array | int, batch: Batch) -> tuple[Params, ChunkInputs]:
        """The trained layers of one of the stage's chunks, and what else `body` takes."""
        stage = lax.axis_index(PIPELINE)
        number = jnp.asarray(self.layout.number)[stage, chunk]
        has_padding = not self.layout.is_real.all()
        is_real = number != PADDING if has_padding else None
        trained = self._layers_of(self.trained, chunk)
        frozen = self._layers_of(self.frozen, chunk)
        return trained, ChunkInputs(frozen, batch, number, is_real)

    def _layers_of(self, params: Params, chunk: Array | int) -> Any:
        layers = jax.tree.map(self._by_chunk, params["layers"])
        layers = read_slot(layers, chunk)
        if not self.loss.is_by_period:
            return layers
        periods = range(self.layout.num_slots)
        return tuple(read_slot(layers, period) for period in periods)

    def _by_chunk(self, leaf: Array) -> Array:
        """[v num_slots, ...] as stored to [v, num_slots, ...]."""
        return leaf.reshape(self.layout.num_chunks, -1, *leaf.shape[1:])

    def _with_frozen(self, rest: Params) -> Params:
        return tree.merge(rest, _without_layers(self.frozen))

    def shapes(self, batch: Batch) -> Shapes:
        """Shapes of what the parts return for a micro-batch."""
        x = jax.eval_shape(self.start, self.rest, batch)

        def first_chunk(x: Array) -> tuple[tuple, dict]:
            layers, inputs = self.chunk(0, batch)
            return self.body(layers, x, inputs)

        (_, loss), by_layer = jax.eval_shape(first_chunk, x)
        sums = jax.eval_shape(self.finish, self.rest, x, batch)
        return Shapes(x, loss, by_layer, sums)

    def in_canonical_order(self, by_layer: dict[str, Array]) -> dict[str, Array]:
        """Metrics of this stage's layers among those of all layers.

        Args:
            by_layer: leaves [v, layers of a chunk, ...].
        Returns:
            leaves [layers of the stack, ...], zero for the layers of other stages.
        """
        num_periods = self.layout.num_periods
        order = self.layout.order.reshape(self.layout.num_stages, -1)
        # Padding goes to a row past the end, which is dropped.
        rows_of_stages = np.where(order == PADDING, num_periods, order)
        rows = jnp.asarray(rows_of_stages)[lax.axis_index(PIPELINE)]
        return jax.tree.map(functools.partial(_spread, rows, num_periods), by_layer)


def _spread(rows: Array, num_periods: int, leaf: Array) -> Array:
    """One leaf of `LossParts.in_canonical_order`; a period may have several layers."""
    _, _, *others = leaf.shape
    by_period = leaf.reshape(len(rows), -1, *others)
    found = jnp.zeros((num_periods, *by_period.shape[1:]), leaf.dtype)
    found = found.at[rows].set(by_period, mode="drop")
    return found.reshape(-1, *others)


def _without_layers(params: Params) -> Params:
    return {name: value for name, value in params.items() if name != "layers"}
