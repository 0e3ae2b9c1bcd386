"""A plan carried out: stages on sub-meshes, with transfers between them, in the order of GPipe.

Source: Huang et al. 2019, GPipe (arXiv 1811.06965), section 2: all forwards, then all backwards,
which recompute a stage from its inputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxscale.parallel.pipeline.slices import evaluate, inputs_of
from jaxscale.planner.atomic import Components, make_components
from jaxscale.planner.stages import StagePlan
from jaxscale.planner.trace import Traced, trace
from jaxscale.types import InputError, check_choice

REPLICA = "replica"


@dataclasses.dataclass(frozen=True, eq=False)
class StageProgram:
    """One stage on its devices.

    Args:
        mesh: its devices, one a replica.
        params: the parameters that it reads.
        batch: the leaves of the batch that it reads.
        inputs: what it reads of earlier stages.
        outputs: what later stages read, and the loss in the stage that makes it.
        forward: (params, batch, inputs) -> outputs.
        backward: (params, batch, inputs, cotangents of outputs that are floating-point numbers) ->
            (gradient of params, cotangents of inputs that are such numbers).
    """

    mesh: Mesh
    params: tuple[Var, ...]
    batch: tuple[Var, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Var, ...]
    forward: Callable
    backward: Callable

    def place(self, values: dict[Var, jax.Array]) -> list[jax.Array]:
        """The stage's parameters, whole on each of its devices."""
        return [self.put(values[var], is_by_row=False) for var in self.params]

    def put(self, value: jax.Array, *, is_by_row: bool) -> jax.Array:
        """A value on this stage's devices, its rows shared out where they divide."""
        rows = value.shape[0] if is_by_row and value.ndim else 0
        is_shared = rows and rows % self.mesh.size == 0
        spec = PartitionSpec(REPLICA) if is_shared else PartitionSpec()
        return jax.device_put(value, NamedSharding(self.mesh, spec))


class StagedGradient:
    """The loss and gradient of a function, stage by stage.

    Args:
        loss: loss(params, batch) -> scalar, as it was traced for the plan.
        params: arrays or shapes.
        batch: arrays or shapes, each [rows, ...].
        plan: of the same function.
        devices: as many as the plan uses; its stages take them in order.
        reduction: "mean" if the loss is a mean over rows, "sum" if it is a sum.
    Raises:
        InputError: there are too few devices, or a micro-batch is not the same program as the
            batch.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], jax.Array],
        params: Any,
        batch: Any,
        *,
        plan: StagePlan,
        devices: Sequence[jax.Device],
        reduction: str = "mean",
    ):
        check_choice("reduction", reduction, ("mean", "sum"))
        if len(devices) < plan.num_devices:
            expected = f"at least the {plan.num_devices} of the plan"
            raise InputError("devices", f"{len(devices)} devices", expected)
        self.plan, self.num_microbatches = plan, plan.num_microbatches
        self._scale = 1 / self.num_microbatches if reduction == "mean" else 1.0
        whole = make_components(trace(loss, params, batch))
        self._traced = trace(loss, params, jax.tree.map(self._shape_of_part, batch))
        _check_same(whole, make_components(self._traced))
        self._loss = self._traced.program.jaxpr.outvars[0]
        self.stages = self._make_stages(whole, devices)

    def __call__(self, params: Any, batch: Any) -> tuple[jax.Array, Any]:
        """(loss, gradient of params); each leaf on the devices of the first stage that reads it."""
        leaves, structure = jax.tree.flatten(params)
        values = dict(zip(self._traced.param_vars, leaves, strict=True))
        passes = _Passes(
            owner=self,
            placed=[stage.place(values) for stage in self.stages],
            parts=self._parts_of(batch),
        )
        passes.forward()
        found = passes.backward()
        gradients = []
        for var, value in values.items():
            is_read = var in found
            gradients.append(found[var] if is_read else jnp.zeros_like(value))
        return passes.loss(), jax.tree.unflatten(structure, gradients)

    def _shape_of_part(self, leaf: Any) -> jax.ShapeDtypeStruct:
        rows, rest = divmod(leaf.shape[0], self.num_microbatches)
        if rest:
            expected = f"a multiple of the plan's {self.num_microbatches} micro-batches"
            raise InputError("batch", f"{leaf.shape[0]} rows", expected)
        return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)

    def _parts_of(self, batch: Any) -> list[dict[Var, jax.Array]]:
        """The leaves of each micro-batch: consecutive rows."""
        num = self.num_microbatches
        parts: list[dict[Var, jax.Array]] = [{} for _ in range(num)]
        leaves = jax.tree.leaves(batch)
        for var, leaf in zip(self._traced.batch_vars, leaves, strict=True):
            cut = jnp.asarray(leaf).reshape(num, -1, *leaf.shape[1:])
            for number, part in enumerate(parts):
                part[var] = cut[number]
        return parts

    def _make_stages(
        self,
        components: Components,
        devices: Sequence[jax.Device],
    ) -> list[StageProgram]:
        rest, found = list(devices), []
        equations = self._traced.program.jaxpr.eqns
        for stage in self.plan.stages:
            own, rest = rest[: stage.num_replicas], rest[stage.num_replicas :]
            reads = _Reads(own, set(), set())
            for component in stage.part.members:
                for number in components.equations[component]:
                    reads.read.update(inputs_of(equations[number]))
                    reads.made.update(equations[number].outvars)
            found.append(reads)
        return [self._program(index, found) for index in range(len(found))]

    def _program(self, index: int, stages: "list[_Reads]") -> StageProgram:
        """The programs of one stage, given what each stage reads and makes."""
        traced, here = self._traced, stages[index]
        before, later = set[Var](), set[Var]()
        for each in stages[:index]:
            before |= each.made
        for each in stages[index + 1 :]:
            later |= each.read
        # Constants that were cloned are made by several stages; each makes its own.
        inputs = _in_order(traced, here.read & before - here.made)
        wanted = here.made & (later | {self._loss})
        outputs = tuple(var for var in _in_order(traced, wanted) if _depends(traced, var))
        mesh = Mesh(np.asarray(here.devices), (REPLICA,))
        params = tuple(var for var in traced.param_vars if var in here.read)
        batch = tuple(var for var in traced.batch_vars if var in here.read)
        run = functools.partial(_run, traced, params, batch, inputs, outputs)
        whole = NamedSharding(mesh, PartitionSpec())
        backward = functools.partial(_backward, run, inputs, outputs)
        return StageProgram(
            mesh,
            params,
            batch,
            inputs,
            outputs,
            forward=jax.jit(run),
            # The sum over replicas is the sharding's.
            backward=jax.jit(backward, out_shardings=(whole, None)),
        )


@dataclasses.dataclass(frozen=True)
class _Reads:
    """What a stage's equations read and make."""

    devices: Sequence[jax.Device]
    read: set[Var]
    made: set[Var]


class _Passes:
    """The values of one step as they come."""

    def __init__(
        self,
        *,
        owner: StagedGradient,
        placed: list[list],
        parts: list[dict],
    ):
        self.owner = owner
        self.placed = placed
        self.parts = parts
        num = owner.num_microbatches
        self.arguments: list[list] = [[None] * len(owner.stages) for _ in range(num)]
        self.values: list[dict[Var, jax.Array]] = [{} for _ in range(num)]
        self.cotangents: list[dict[Var, jax.Array]] = [{} for _ in range(num)]

    def forward(self) -> None:
        """All forwards: stage s has micro-batch m in tick s + m."""
        for s, m in self._ticks(range(len(self.owner.stages))):
            stage, part, values = self.owner.stages[s], self.parts[m], self.values[m]
            batch = [stage.put(part[var], is_by_row=True) for var in stage.batch]
            inputs = [stage.put(values[var], is_by_row=True) for var in stage.inputs]
            arguments = (self.placed[s], batch, inputs)
            outputs = stage.forward(*arguments)
            values.update(zip(stage.outputs, outputs, strict=True))
            self.arguments[m][s] = arguments

    def backward(self) -> dict[Var, jax.Array]:
        """All backwards, the last stage first: the gradients by parameter."""
        gradients: dict[Var, jax.Array] = {}
        stages = self.owner.stages
        for s, m in self._ticks(reversed(range(len(stages)))):
            stage = stages[s]
            outputs = filter(_is_float, stage.outputs)
            given = [self._cotangent(stage, m, var) for var in outputs]
            of_params, of_inputs = stage.backward(*self.arguments[m][s], given)
            for var, gradient in zip(stage.params, of_params, strict=True):
                _add(gradients, var, gradient)
            inputs = filter(_is_float, stage.inputs)
            for var, cotangent in zip(inputs, of_inputs, strict=True):
                _add(self.cotangents[m], var, cotangent)
            self.arguments[m][s] = None
        return gradients

    def loss(self) -> jax.Array:
        """The loss of all micro-batches."""
        losses = [values[self.owner._loss] for values in self.values]
        return sum(losses[1:], losses[0]) * self.owner._scale

    def _cotangent(self, stage: StageProgram, m: int, var: Var) -> jax.Array:
        zero = jnp.zeros(var.aval.shape, var.aval.dtype)
        given = self.cotangents[m].pop(var, zero)
        if var is self.owner._loss:
            given = given + jnp.asarray(self.owner._scale, var.aval.dtype)
        return stage.put(given, is_by_row=True)

    def _ticks(self, stages: Any) -> list[tuple[int, int]]:
        """(stage, micro-batch) in the order of ticks."""
        order, found = list(stages), []
        num = self.owner.num_microbatches
        for tick in range(num + len(order) - 1):
            for place, stage in enumerate(order):
                microbatch = tick - place
                if 0 <= microbatch < num:
                    found.append((stage, microbatch))
        return found


def _add(sums: dict[Var, jax.Array], var: Var, value: jax.Array) -> None:
    """Adds on the devices that have the sum."""
    if var in sums:
        sums[var] = sums[var] + jax.device_put(value, sums[var].sharding)
    else:
        sums[var] = value


def _run(
    traced: Traced,
    params: tuple[Var, ...],
    batch: tuple[Var, ...],
    inputs: tuple[Var, ...],
    outputs: tuple[Var, ...],
    *values: Sequence,
) -> list:
    """A stage's equations, and the constants that it makes itself."""
    of_params, of_batch, of_inputs = values
    given = dict(zip(params + batch, [*of_params, *of_batch], strict=True))
    leaves = [given.get(var) for var in traced.program.jaxpr.invars]
    known = dict(zip(inputs, of_inputs, strict=True))
    return evaluate(traced.program, leaves, outputs, known)


def _backward(
    run: Callable,
    inputs: tuple[Var, ...],
    outputs: tuple[Var, ...],
    params: Sequence,
    batch: Sequence,
    values: Sequence,
    cotangents: Sequence,
) -> tuple[list, list]:
    """Runs a stage again and pulls cotangents back, through what is a floating-point number."""
    is_float = [_is_float(var) for var in inputs]

    def differentiated(params: Sequence, floats: Sequence) -> list:
        rest, merged = iter(floats), []
        for flag, value in zip(is_float, values, strict=True):
            merged.append(next(rest) if flag else value)
        found = run(params, batch, merged)
        pairs = zip(outputs, found, strict=True)
        return [value for var, value in pairs if _is_float(var)]

    floats = [value for flag, value in zip(is_float, values) if flag]
    _, pullback = jax.vjp(differentiated, params, floats)
    return pullback(list(cotangents))


def _is_float(var: Var) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)


def _in_order(traced: Traced, variables: set[Var]) -> tuple[Var, ...]:
    """Variables in the order in which the program makes them."""
    made = (var for equation in traced.program.jaxpr.eqns for var in equation.outvars)
    return tuple(var for var in made if var in variables)


def _depends(traced: Traced, var: Var) -> bool:
    """Whether an equation that is in no component as a clone makes a variable."""
    pairs = zip(traced.program.jaxpr.eqns, traced.depends_on_batch, strict=True)
    for equation, depends in pairs:
        if var in equation.outvars:
            return depends
    return False


def _check_same(whole: Components, part: Components) -> None:
    """Raises InputError unless a micro-batch is the same program but for its shapes."""
    names = [
        [equation.primitive.name for equation in each.traced.program.jaxpr.eqns]
        for each in (whole, part)
    ]
    if names[0] != names[1] or whole.equations != part.equations:
        expected = "a function whose program does not depend on the number of rows"
        raise InputError("loss", "another program for a micro-batch", expected)
