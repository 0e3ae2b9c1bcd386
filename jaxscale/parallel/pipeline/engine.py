"""Pipeline parallelism: runs a schedule's table inside the manual region.

Nothing here is differentiated from outside: each stage pulls its own cotangents back, in the tick
its table says. What only some stages do stands in a branch (`lax.cond`); a branch may hold
collectives of a group in which all take it, over any axis but `pipeline`, and never a permute. The
two permutes between neighbours stand after the branches.

F, B and W stand there once for each slot of residuals (`lax.switch`): an array whose place is known
is written by what makes it and read by what uses it, where in a stack of slots the write and the
read would each be a copy.

Source: Narayanan et al. 2021 (arXiv 2104.04473); Qi et al. 2023 (arXiv 2401.10241).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale import tree
from jaxscale.ops.backends import Operations
from jaxscale.parallel.mesh import PIPELINE
from jaxscale.parallel.pipeline.programs import Split, split
from jaxscale.parallel.pipeline.schedule import NONE, Rows, Schedule
from jaxscale.parallel.pipeline.stages import PADDING, StageLayout
from jaxscale.types import Array, Batch, Params

Sums = tuple[Array, Array, dict[str, Array]]


@runtime_checkable
class StagedLoss(Protocol):
    """A loss in the three parts that stages run; see `train.losses.NextTokenLoss`."""

    @property
    def is_by_period(self) -> bool:
        """Whether `body` takes a tuple of its periods' trees: each then has a gradient of its own to add to."""

    def start(self, params: Params, batch: Batch, *, operations: Operations) -> Array:
        """What comes before the layers: the residual [b, own T, D]."""

    def prepare(self, layers: Params) -> Params:
        """The layers' parameters in other types; its gradient is one more such conversion."""

    def body(
        self,
        layers: Params,
        x: Array,
        batch: Batch,
        number: Array,
        is_real: Array | None,
        *,
        operations: Operations,
    ) -> Any:
        """Periods of the stack, of canonical numbers: (residual, sum of their losses, metrics by layer)."""

    def finish(self, params: Params, x: Array, batch: Batch, *, operations: Operations) -> Sums:
        """What comes after the layers: the loss as sums."""


class _Bank(NamedTuple):
    """Slots of one stack: what F keeps, and what B leaves for W where W is apart."""

    kept: tuple
    extra: tuple


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "activations",
        "cotangents",
        "banks",
        "sent",
        "layers",
        "rest",
        "sums",
        "by_layer",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Carry:
    """What a stage holds between ticks.

    Args:
        activations, cotangents: [slots + 1, b, t, D]; the last is for what nobody reads.
        banks: slots of what F keeps and B leaves for W, leaves [slots of a bank, ...].
        sent: (activation for the next stage, cotangent for the previous one).
        layers, rest: gradients so far, of what `body` takes (leaves [V, ...] if V > 1) and of what
            is in no layer.
        sums: the loss's sums so far.
        by_layer: the body's metrics so far, leaves [V, layers, ...].
    """

    activations: Array
    cotangents: Array
    banks: tuple[_Bank, ...]
    sent: tuple[Array, Array]
    layers: Params
    rest: Params
    sums: Sums
    by_layer: dict[str, Array]


class _Shapes(NamedTuple):
    """Shapes of a stage's residual, its body's loss and metrics, and the sums of the end."""

    x: jax.ShapeDtypeStruct
    loss: jax.ShapeDtypeStruct
    by_layer: dict[str, jax.ShapeDtypeStruct]
    sums: Any


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """One stage's view of a pipelined loss; made and used inside the manual region.

    Args:
        loss: what is computed.
        operations: what the mesh injects.
        layout: which periods each stage holds.
        schedule: when each stage does what.
        trained: the stage's parameters that are trained, held for the step and `loss.prepare`d;
            None elsewhere.
        frozen: the others; None elsewhere.
        microbatches: leaves [M, b, ...].
        reduction: type in which gradients add up.
    """

    loss: StagedLoss
    operations: Operations
    layout: StageLayout
    schedule: Schedule
    trained: Params
    frozen: Params
    microbatches: Batch
    reduction: str

    def gradient(self) -> tuple[Sums, Params]:
        """The sums over own micro-batches and the gradients of the sum of losses: this stage's share of both."""
        rows = jax.tree.map(jnp.asarray, self.schedule.rows)
        carry = lax.scan(self._tick, self._first_carry(), rows)[0]
        loss, weight, metrics = carry.sums
        gradients = {**carry.rest, "layers": self._together(carry.layers)}
        return (loss, weight, metrics | self._in_order(carry.by_layer)), gradients

    # One tick

    def _tick(self, carry: _Carry, rows: Rows) -> tuple[_Carry, None]:
        row = jax.tree.map(lambda column: column[lax.axis_index(PIPELINE)], rows)
        activation, cotangent = carry.sent
        carry = dataclasses.replace(
            carry,
            activations=_put(carry.activations, row.activation_store, activation),
            cotangents=_put(carry.cotangents, row.cotangent_store, cotangent),
        )
        carry = lax.cond(row.forward != NONE, self._forward, _idle, carry, row)
        carry = lax.cond(row.backward != NONE, self._backward, _idle, carry, row)
        if self.schedule.is_split:
            carry = lax.cond(row.weight != NONE, self._weight, _idle, carry, row)
        activation, cotangent = carry.sent
        return dataclasses.replace(
            carry, sent=(self._shift(activation, 1), self._shift(cotangent, -1))
        ), None

    def _forward(self, carry: _Carry, row: Rows) -> _Carry:
        batch = _get(self.microbatches, row.forward)
        x = lax.cond(
            row.activation_read == NONE,
            lambda: self._start(self._rest, batch),
            lambda: _get(carry.activations, row.activation_read),
        )

        def run(bank: int, carry: _Carry, index: Array) -> _Carry:
            (y, loss), metrics, kept = self._split.forward(
                *self._chunk(row.forward_chunk, x, batch)
            )
            return dataclasses.replace(
                carry,
                banks=_replaced(carry.banks, bank, kept=_put(carry.banks[bank].kept, index, kept)),
                sent=(y, carry.sent[1]),
                sums=(carry.sums[0] + loss, *carry.sums[1:]),
                by_layer=_add(carry.by_layer, metrics, row.forward_chunk),
            )

        carry = self._at(row.residual_store, run, carry)
        return lax.cond(row.cotangent_own != NONE, self._turn, _idle, carry, row, batch)

    def _turn(self, carry: _Carry, row: Rows, batch: Batch) -> _Carry:
        """The end of the last chunk: the loss, and its cotangent where other stages store what arrives."""

        def sum_loss(rest: Params, y: Array) -> tuple[Array, Sums]:
            sums = self._finish(rest, y, batch)
            return sums[0], sums

        (gradient, dy), sums = jax.grad(sum_loss, argnums=(0, 1), has_aux=True)(
            self._rest, carry.sent[0]
        )
        return dataclasses.replace(
            carry,
            cotangents=_put(carry.cotangents, row.cotangent_own, dy),
            rest=_add(carry.rest, gradient),
            sums=jax.tree.map(jnp.add, carry.sums, sums),
        )

    def _backward(self, carry: _Carry, row: Rows) -> _Carry:
        batch = _get(self.microbatches, row.backward)
        dy = _get(carry.cotangents, row.cotangent_read), jnp.ones((), self._shapes.loss.dtype)

        def run(bank: int, carry: _Carry, index: Array) -> _Carry:
            layers, _, inputs = self._chunk(row.backward_chunk, None, batch)
            kept = _get(carry.banks[bank].kept, index)
            dx, extra = self._split.backward(layers, inputs, kept, dy)
            carry = dataclasses.replace(carry, sent=(carry.sent[0], dx))
            if self.schedule.is_split:
                extra = _put(carry.banks[bank].extra, index, extra)
                return dataclasses.replace(carry, banks=_replaced(carry.banks, bank, extra=extra))
            gradient = self._split.weight(layers, inputs, kept, extra)
            return self._add_layers(carry, gradient, row.backward_chunk)

        carry = self._at(row.residual_read, run, carry)
        is_first = (row.backward_chunk == 0) & (lax.axis_index(PIPELINE) == 0)
        return lax.cond(is_first, self._start_backward, _idle, carry, row, batch)

    def _start_backward(self, carry: _Carry, row: Rows, batch: Batch) -> _Carry:
        (gradient,) = jax.vjp(lambda rest: self._start(rest, batch), self._rest)[1](carry.sent[1])
        return dataclasses.replace(carry, rest=_add(carry.rest, gradient))

    def _weight(self, carry: _Carry, row: Rows) -> _Carry:
        def run(bank: int, carry: _Carry, index: Array) -> _Carry:
            layers, _, inputs = self._chunk(
                row.weight_chunk, None, _get(self.microbatches, row.weight)
            )
            gradient = self._split.weight(layers, inputs, *_get(carry.banks[bank], index))
            return self._add_layers(carry, gradient, row.weight_chunk)

        return self._at(row.residual_weight, run, carry)

    def _add_layers(self, carry: _Carry, gradient: Params, chunk: Array) -> _Carry:
        """Adds to a chunk's; one alone has no dim of chunks, for a matmul can add to what has its output's shape."""
        layers = _add(carry.layers, gradient, chunk if self.layout.num_chunks > 1 else None)
        return dataclasses.replace(carry, layers=layers)

    def _together(self, layers: Params) -> Params:
        """The gradients of the own periods, leaves [V periods, ...]."""
        axis = int(self.layout.num_chunks > 1)
        if self.loss.is_by_period:
            layers = jax.tree.map(lambda *periods: jnp.stack(periods, axis), *layers)
            layers = lax.optimization_barrier(
                layers
            )  # fused with the update, stacks would not let it work in place
        return jax.tree.map(lambda g: g.reshape(-1, *g.shape[1 + axis :]), layers)

    def _at(
        self, slot: Array, run: Callable[[int, _Carry, Array], _Carry], carry: _Carry
    ) -> _Carry:
        """`run(bank, carry, index)` for a slot of residuals; a bank's number is known when it is compiled."""
        branches = [functools.partial(run, bank) for bank in range(len(carry.banks))]
        return lax.switch(slot // self._bank_size, branches, carry, slot % self._bank_size)

    @property
    def _bank_size(self) -> int:
        """Slots of a bank: one, but all where there are so many (GPipe's) that the program would be many models long.

        Cost: up to 2 V S - 1 programs of 1 / (V S) of the model, so F, B and W stand there less
            than twice each.
        """
        num = self.schedule.num_residual_slots
        return 1 if num < 2 * self.layout.num_virtual else num

    def _shift(self, x: Array, by: int) -> Array:
        """To the next (+1) or previous (-1) stage; round the ring only where chunks need it."""
        num = self.layout.num_stages
        pairs = [
            (i, (i + by) % num)
            for i in range(num)
            if self.layout.num_chunks > 1 or 0 <= i + by < num
        ]
        return lax.ppermute(x, PIPELINE, pairs)

    # The parts of the loss as functions of the trained parameters

    @property
    def _rest(self) -> Params:
        return {name: value for name, value in self.trained.items() if name != "layers"}

    def _start(self, rest: Params, batch: Batch) -> Array:
        return self.loss.start(self._whole(rest), batch, operations=self.operations)

    def _finish(self, rest: Params, x: Array, batch: Batch) -> Sums:
        return self.loss.finish(self._whole(rest), x, batch, operations=self.operations)

    def _whole(self, rest: Params) -> Params:
        return tree.merge(
            rest, {name: value for name, value in self.frozen.items() if name != "layers"}
        )

    def _body(self, layers: Params, x: Array, inputs: tuple[Params, Batch, Array, Array | None]):
        frozen, batch, number, is_real = inputs
        layers = tree.merge(layers, frozen)
        y, loss, metrics = self.loss.body(
            layers, x, batch, number, is_real, operations=self.operations
        )
        return (y, loss), metrics

    def _chunk(
        self, chunk: Array | int, x: Array | None, batch: Batch
    ) -> tuple[Params, Array | None, tuple]:
        """The arguments of `_body` for one chunk: only the first is differentiated."""
        number = jnp.asarray(self.layout.number)[lax.axis_index(PIPELINE), chunk]
        real = None if self.layout.is_real.all() else number != PADDING
        trained, frozen = (
            _get(jax.tree.map(self._by_chunk, p["layers"]), chunk)
            for p in (self.trained, self.frozen)
        )
        if self.loss.is_by_period:
            trained, frozen = (
                tuple(_get(p, i) for i in range(len(number))) for p in (trained, frozen)
            )
        return trained, x, (frozen, batch, number, real)

    def _by_chunk(self, leaf: Array) -> Array:
        return leaf.reshape(self.layout.num_chunks, -1, *leaf.shape[1:])

    @functools.cached_property
    def _shapes(self) -> _Shapes:
        batch = _get(self.microbatches, 0)
        x = jax.eval_shape(self._start, self._rest, batch)
        (_, loss), by_layer = jax.eval_shape(lambda x: self._body(*self._chunk(0, x, batch)), x)
        return _Shapes(x, loss, by_layer, jax.eval_shape(self._finish, self._rest, x, batch))

    @functools.cached_property
    def _split(self) -> Split:
        arguments = jax.eval_shape(
            lambda x: self._chunk(0, x, _get(self.microbatches, 0)), self._shapes.x
        )
        return split(self._body, *arguments, is_deep=self.schedule.is_split)

    def _first_carry(self) -> _Carry:
        schedule, shapes = self.schedule, self._shapes
        zeros, gradient = (
            jnp.zeros(shapes.x.shape, shapes.x.dtype),
            functools.partial(_zeros, dtype=self.reduction),
        )
        layers = jax.eval_shape(lambda: self._chunk(0, None, _get(self.microbatches, 0))[0])
        slot = _Bank(self._split.kept, self._split.extra if schedule.is_split else ())
        return _Carry(
            activations=_slots(shapes.x, schedule.num_activation_slots + 1),
            cotangents=_slots(shapes.x, schedule.num_cotangent_slots + 1),
            banks=tuple(
                _slots(slot, self._bank_size)
                for _ in range(0, schedule.num_residual_slots, self._bank_size)
            ),
            sent=(zeros, zeros),
            layers=gradient(
                _stacked(layers, schedule.num_chunks) if schedule.num_chunks > 1 else layers
            ),
            rest=gradient(self._rest),
            sums=_zeros(shapes.sums),
            by_layer=_zeros(_stacked(shapes.by_layer, self.layout.num_chunks)),
        )

    def _in_order(self, by_layer: dict[str, Array]) -> dict[str, Array]:
        """Metrics [V, layers of a chunk, ...] to rows of all layers in canonical order, zero where others have them."""
        order = self.layout.order.reshape(self.layout.num_stages, -1)
        rows = jnp.asarray(np.where(order == PADDING, self.layout.num_periods, order))[
            lax.axis_index(PIPELINE)
        ]

        def one(leaf: Array) -> Array:
            by_period = leaf.reshape(len(rows), -1, *leaf.shape[2:])
            whole = jnp.zeros((self.layout.num_periods, *by_period.shape[1:]), leaf.dtype)
            return whole.at[rows].set(by_period, mode="drop").reshape(-1, *leaf.shape[2:])

        return jax.tree.map(one, by_layer)

    def evaluate(self) -> Sums:
        """The sums of the first micro-batch; it passes the chunks one by one, while the other stages wait."""
        batch, shapes = _get(self.microbatches, 0), self._shapes
        carry = (
            jnp.zeros(shapes.x.shape, shapes.x.dtype),
            jnp.zeros((), shapes.loss.dtype),
            _zeros(_stacked(shapes.by_layer, self.layout.num_chunks)),
        )
        stage = lax.axis_index(PIPELINE)
        for virtual in range(self.layout.num_virtual):
            chunk, owner = divmod(virtual, self.layout.num_stages)
            run = functools.partial(
                self._evaluate_chunk, chunk=chunk, is_first=virtual == 0, batch=batch
            )
            carry = lax.cond(stage == owner, run, lambda carry: carry, carry)
            if virtual + 1 < self.layout.num_virtual:
                carry = (self._shift(carry[0], 1), *carry[1:])
        x, loss, by_layer = carry
        is_last = stage == self.layout.num_stages - 1
        sums = lax.cond(
            is_last, lambda: self._finish(self._rest, x, batch), lambda: _zeros(shapes.sums)
        )
        return sums[0] + loss, sums[1], sums[2] | self._in_order(by_layer)

    def _evaluate_chunk(self, carry: tuple, *, chunk: int, is_first: bool, batch: Batch) -> tuple:
        x, loss, by_layer = carry
        x = self._start(self._rest, batch) if is_first else x
        (y, own), metrics = self._body(*self._chunk(chunk, x, batch))
        return (
            y,
            loss + own,
            jax.tree.map(lambda old, new: old.at[chunk].set(new), by_layer, metrics),
        )


def _idle(carry: _Carry, *_: Any) -> _Carry:
    return carry


def _get(slots: Any, index: Array | int) -> Any:
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), slots
    )


def _put(slots: Any, index: Array, values: Any) -> Any:
    """Writes to a slot; NONE is the last, which nobody reads where there is one to spare."""

    def one(leaf: Array, value: Array) -> Array:
        return lax.dynamic_update_index_in_dim(
            leaf, value, jnp.where(index == NONE, leaf.shape[0] - 1, index), 0
        )

    return jax.tree.map(one, slots, values)


def _replaced(banks: tuple[_Bank, ...], bank: int, **fields: tuple) -> tuple[_Bank, ...]:
    return *banks[:bank], banks[bank]._replace(**fields), *banks[bank + 1 :]


def _add(sums: Any, gradients: Any, chunk: Array | None = None) -> Any:
    """Adds in the type of `sums`, to all or to one chunk."""
    if chunk is None:
        return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, gradients)
    return jax.tree.map(lambda s, g: s.at[chunk].add(g.astype(s.dtype)), sums, gradients)


def _zeros(shapes: Any, dtype: str | None = None) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, dtype or s.dtype), shapes)


def _stacked(shapes: Any, num: int) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((num, *s.shape), s.dtype), shapes)


def _slots(shapes: Any, num: int) -> Any:
    return jax.tree.map(lambda s: lax.empty(s.shape, s.dtype), _stacked(shapes, num))
