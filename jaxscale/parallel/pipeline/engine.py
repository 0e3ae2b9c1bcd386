"""Pipeline parallelism: runs a schedule's table inside the manual region.

Nothing here is differentiated from outside. Each stage calls its own programs for forward, backward
and weight gradient, in the ticks in which the table says so, and adds the gradients up.

What only some stages do in a tick stands in a branch (`lax.cond`). All devices of a stage take the
same branch, so it may hold collectives over any axis but `pipeline`. It may not hold a permute,
which on CPUs pairs all devices, those of other stages too. The two permutes that exchange
activations and cotangents between neighbouring stages stand after the branches.

Source: Narayanan et al. 2021 (arXiv 2104.04473); Qi et al. 2023 (arXiv 2401.10241).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.backends import Operations
from jaxscale.parallel.mesh import PIPELINE
from jaxscale.parallel.pipeline.carry import Bank, Carry
from jaxscale.parallel.pipeline.head import counted_once, from_last_stage
from jaxscale.parallel.pipeline.loss import LossParts, Shapes, StagedLoss, Sums
from jaxscale.parallel.pipeline.programs import StagePrograms, make_stage_programs
from jaxscale.parallel.pipeline.schedule import NONE, Rows, Schedule
from jaxscale.parallel.pipeline.slots import empty_slots, read_slot, stacked, zeros
from jaxscale.parallel.pipeline.stages import StageLayout
from jaxscale.types import Array, Batch, Params


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
        microbatches: leaves [m, b, ...].
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
        """This stage's share of the sums and of the gradients of the sum of losses.

        Both are over the micro-batches of this device.
        """
        rows = jax.tree.map(jnp.asarray, self.schedule.rows)
        carry, _ = lax.scan(self._tick, self._first_carry(), rows)
        loss, weight, metrics = carry.sums
        gradients = {**carry.rest, "layers": self._stack_chunks(carry.layers)}
        metrics = metrics | self._parts.in_canonical_order(carry.by_layer)
        return (loss, weight, metrics), gradients

    def evaluate(self) -> Sums:
        """The sums of the first micro-batch.

        It passes the chunks one by one, while the other stages wait.
        """
        batch = self._microbatch(0)
        shapes = self._shapes
        x = jnp.zeros(shapes.x.shape, shapes.x.dtype)
        loss = jnp.zeros((), shapes.loss.dtype)
        by_layer = zeros(stacked(shapes.by_layer, self.layout.num_chunks))
        passing = (x, loss, by_layer)
        stage = lax.axis_index(PIPELINE)
        for virtual in range(self.layout.num_virtual):
            chunk, owner = divmod(virtual, self.layout.num_stages)
            run = functools.partial(
                self._evaluate_chunk,
                chunk=chunk,
                is_first=virtual == 0,
                batch=batch,
            )
            passing = lax.cond(stage == owner, run, lambda same: same, passing)
            if virtual + 1 < self.layout.num_virtual:
                x, loss, by_layer = passing
                passing = (self._shift(x, 1), loss, by_layer)
        x, loss, by_layer = passing
        sum_loss, weight, metrics = self._finished(self._parts.rest, from_last_stage(x), batch)
        metrics = metrics | self._parts.in_canonical_order(by_layer)
        return sum_loss + loss, weight, metrics

    def _evaluate_chunk(
        self,
        passing: tuple,
        *,
        chunk: int,
        is_first: bool,
        batch: Batch,
    ) -> tuple:
        """Adds one chunk's layers to what passes the stages: (residual, loss, metrics)."""
        x, loss, by_layer = passing
        if is_first:
            x = self._parts.start(self._parts.rest, batch)
        layers, inputs = self._parts.chunk(chunk, batch)
        (y, chunk_loss), metrics = self._parts.body(layers, x, inputs)

        def insert(old: Array, new: Array) -> Array:
            return old.at[chunk].set(new)

        return y, loss + chunk_loss, jax.tree.map(insert, by_layer, metrics)

    # One tick

    def _tick(self, carry: Carry, rows: Rows) -> tuple[Carry, None]:
        stage = lax.axis_index(PIPELINE)
        row = jax.tree.map(lambda column: column[stage], rows)
        carry = carry.store_activation(row.activation_store, carry.activation_sent)
        carry = carry.store_cotangent(row.cotangent_store, carry.cotangent_sent)
        carry = _unless_none(row.forward, self._forward, carry, row)
        # Every stage knows what the last one does, and takes its share of the head.
        last = jax.tree.map(lambda column: column[-1], rows)
        carry = _unless_none(last.cotangent_own, self._finish, carry, row, last.forward)
        carry = _unless_none(row.backward, self._backward, carry, row)
        if self.schedule.is_split:
            carry = _unless_none(row.weight, self._weight, carry, row)
        # What a stage did not make in this tick is sent all the same: every device must take part
        # in a permute. The receiver has no slot for it.
        carry = dataclasses.replace(
            carry,
            activation_sent=self._shift(carry.activation_sent, 1),
            cotangent_sent=self._shift(carry.cotangent_sent, -1),
        )
        return carry, None

    def _forward(self, carry: Carry, row: Rows) -> Carry:
        batch = self._microbatch(row.forward)
        x = lax.cond(
            row.activation_read == NONE,
            lambda: self._parts.start(self._parts.rest, batch),
            lambda: read_slot(carry.activations, row.activation_read),
        )

        def run(bank: int, carry: Carry, index: Array) -> Carry:
            layers, inputs = self._parts.chunk(row.forward_chunk, batch)
            (y, loss), metrics, kept = self._programs.forward(layers, x, inputs)
            carry = carry.keep(bank, index, kept)
            carry = carry.add_body_figures(loss, metrics, row.forward_chunk)
            return dataclasses.replace(carry, activation_sent=y)

        return self._switch_bank(row.residual_store, run, carry)

    def _finish(self, carry: Carry, row: Rows, number: Array) -> Carry:
        """After the forward of the last chunk: the loss, and its cotangent as if it had arrived.

        Args:
            carry, row: of this stage.
            number: of the micro-batch whose forward the last stage has done.
        """
        batch = self._microbatch(number)

        def sum_loss(rest: Params, y: Array) -> tuple[Array, Sums]:
            sums = self._finished(rest, y, batch)
            return sums[0], sums

        gradient = jax.grad(sum_loss, argnums=(0, 1), has_aux=True)
        y = from_last_stage(carry.activation_sent)
        (drest, dy), sums = gradient(self._parts.rest, y)
        # Each stage has what comes through its share of the head.
        carry = carry.store_cotangent(row.cotangent_own, lax.psum(dy, PIPELINE))
        carry = carry.add_rest(drest)
        sums = jax.tree.map(jnp.add, carry.sums, sums)
        return dataclasses.replace(carry, sums=sums)

    def _finished(self, rest: Params, y: Array, batch: Batch) -> Sums:
        """The loss as sums, which all stages compute and which count once."""
        return counted_once(self._parts.finish(rest, y, batch))

    def _backward(self, carry: Carry, row: Rows) -> Carry:
        batch = self._microbatch(row.backward)
        dy = read_slot(carry.cotangents, row.cotangent_read)
        # The layers' losses, such as a router's, are terms of the loss: their cotangent is 1.
        one = jnp.ones((), self._shapes.loss.dtype)
        cotangents = (dy, one)

        def run(bank: int, carry: Carry, index: Array) -> Carry:
            layers, inputs = self._parts.chunk(row.backward_chunk, batch)
            kept = read_slot(carry.banks[bank].kept, index)
            dx, extra = self._programs.backward(layers, inputs, kept, cotangents)
            carry = dataclasses.replace(carry, cotangent_sent=dx)
            if self.schedule.is_split:
                return carry.keep_extra(bank, index, extra)
            gradient = self._programs.weight(layers, inputs, kept, extra)
            return self._add_layers(carry, gradient, row.backward_chunk)

        carry = self._switch_bank(row.residual_read, run, carry)
        is_first_stage = lax.axis_index(PIPELINE) == 0
        is_first = (row.backward_chunk == 0) & is_first_stage
        return lax.cond(is_first, self._start_backward, _unchanged, carry, batch)

    def _start_backward(self, carry: Carry, batch: Batch) -> Carry:
        """After the backward of the first chunk: the gradient of what comes before the layers."""

        def start(rest: Params) -> Array:
            return self._parts.start(rest, batch)

        _, pullback = jax.vjp(start, self._parts.rest)
        (drest,) = pullback(carry.cotangent_sent)
        return carry.add_rest(drest)

    def _weight(self, carry: Carry, row: Rows) -> Carry:
        batch = self._microbatch(row.weight)

        def run(bank: int, carry: Carry, index: Array) -> Carry:
            layers, inputs = self._parts.chunk(row.weight_chunk, batch)
            kept, extra = read_slot(carry.banks[bank], index)
            gradient = self._programs.weight(layers, inputs, kept, extra)
            return self._add_layers(carry, gradient, row.weight_chunk)

        return self._switch_bank(row.residual_weight, run, carry)

    def _add_layers(
        self,
        carry: Carry,
        gradient: Params,
        chunk: Array,
    ) -> Carry:
        """Adds the gradient of a chunk's layers.

        The gradients of a single chunk have no dim of chunks: XLA lets a matmul add to an array of
        its output's shape, but not to a slice of one.
        """
        return carry.add_layers(gradient, chunk if self.layout.num_chunks > 1 else None)

    def _shift(self, x: Array, by: int) -> Array:
        """Sends to the next (+1) or previous (-1) stage.

        From the last stage to the first it goes only where several chunks need it.
        """
        num = self.layout.num_stages
        pairs = [(i, (i + by) % num) for i in range(num)]
        if self.layout.num_chunks == 1:
            pairs = [(i, to) for i, to in pairs if to == i + by]
        return lax.ppermute(x, PIPELINE, pairs)

    def _microbatch(self, number: Array | int) -> Batch:
        return read_slot(self.microbatches, number)

    # Residual slots

    def _switch_bank(
        self,
        slot: Array,
        run: Callable[[int, Carry, Array], Carry],
        carry: Carry,
    ) -> Carry:
        """run(bank, carry, index in the bank) for a residual slot, with a branch for each bank.

        A bank's number is known when its branch is compiled. The branch then writes residuals
        straight to the bank's arrays, and reads them from there. With all slots in one stack,
        where the place is known only at run time, each write and each read would be a copy.
        """
        banks = range(self._num_banks)
        branches = [functools.partial(run, bank) for bank in banks]
        bank = slot // self._bank_size
        index = slot % self._bank_size
        return lax.switch(bank, branches, carry, index)

    @property
    def _bank_size(self) -> int:
        """Slots of a bank: one, or all if there are so many that the program would grow too long.

        GPipe has that many.

        Cost: up to 2 v p - 1 branches, each a program of 1 / (v p) of the model, so the whole
            model's forward, backward and weight gradient are each compiled less than twice.
        """
        num_slots = self.schedule.num_residual_slots
        return 1 if num_slots < 2 * self.layout.num_virtual else num_slots

    @property
    def _num_banks(self) -> int:
        return self.schedule.num_residual_slots // self._bank_size

    # Before the first tick and after the last

    @functools.cached_property
    def _parts(self) -> LossParts:
        return LossParts(self.loss, self.operations, self.layout, self.trained, self.frozen)

    @functools.cached_property
    def _shapes(self) -> Shapes:
        return self._parts.shapes(self._microbatch(0))

    @functools.cached_property
    def _programs(self) -> StagePrograms:
        layers, inputs = self._chunk_shapes
        is_deep = self.schedule.is_split
        return make_stage_programs(
            self._parts.body,
            layers,
            self._shapes.x,
            inputs,
            is_deep=is_deep,
        )

    @functools.cached_property
    def _chunk_shapes(self) -> Any:
        return jax.eval_shape(lambda: self._parts.chunk(0, self._microbatch(0)))

    def _first_carry(self) -> Carry:
        schedule = self.schedule
        shapes = self._shapes
        nothing = jnp.zeros(shapes.x.shape, shapes.x.dtype)
        extra = self._programs.extra if schedule.is_split else ()
        slot = Bank(self._programs.kept, extra)
        banks = [empty_slots(slot, self._bank_size) for _ in range(self._num_banks)]
        layers, _ = self._chunk_shapes
        if schedule.num_chunks > 1:
            layers = stacked(layers, schedule.num_chunks)
        return Carry(
            activations=empty_slots(shapes.x, schedule.num_activation_slots + 1),
            cotangents=empty_slots(shapes.x, schedule.num_cotangent_slots + 1),
            banks=tuple(banks),
            activation_sent=nothing,
            cotangent_sent=nothing,
            layers=zeros(layers, self.reduction),
            rest=zeros(self._parts.rest, self.reduction),
            sums=zeros(shapes.sums),
            by_layer=zeros(stacked(shapes.by_layer, schedule.num_chunks)),
        )

    def _stack_chunks(self, layers: Params) -> Params:
        """The gradients of this stage's layers as it stores them, leaves [v num_slots, ...]."""
        periods_axis = 1 if self.layout.num_chunks > 1 else 0

        def stack(*periods: Array) -> Array:
            return jnp.stack(periods, periods_axis)

        def merge_chunks(leaf: Array) -> Array:
            of_a_period = leaf.shape[1 + periods_axis :]
            return leaf.reshape(-1, *of_a_period)

        if self.loss.is_by_period:
            layers = jax.tree.map(stack, *layers)
            # Fused with the optimizer's update, the stacking would keep it from working in place.
            layers = lax.optimization_barrier(layers)
        return jax.tree.map(merge_chunks, layers)


def _unless_none(
    number: Array,
    operation: Callable[..., Carry],
    carry: Carry,
    *arguments: Any,
) -> Carry:
    """operation(carry, *arguments) in the stages that have a number in this tick."""
    return lax.cond(number != NONE, operation, _unchanged, carry, *arguments)


def _unchanged(carry: Carry, *_: Any) -> Carry:
    return carry
