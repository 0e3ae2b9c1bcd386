"""Measured costs: each distinct block of a program runs once, forward and backward."""

import dataclasses
import functools
import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from jaxscale.parallel.pipeline.slices import evaluate, inputs_of
from jaxscale.planner.atomic import Components
from jaxscale.planner.cluster import Device
from jaxscale.planner.costs import ModelledCosts, Part, PartCost
from jaxscale.types import Array

logger = logging.getLogger(__name__)

NUM_TIMED = 3
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


class MeasuredCosts(ModelledCosts):
    """Costs whose seconds are measured; a part takes as long as the blocks that it is made of.

    Args:
        components: of a traced loss.
        device: whose table says what is not measured.
        blocks: of the components; each distinct one, by the hash of its program with shapes, runs
            once. One that runs out of memory takes infinitely long, so that no plan has it.
        measure_on: where they run.
    """

    def __init__(
        self,
        components: Components,
        device: Device,
        blocks: Sequence[Part],
        measure_on: jax.Device,
    ):
        super().__init__(components, device)
        self.blocks = blocks
        self.num_hits = 0
        self._by_hash: dict[str, tuple[float, float]] = {}
        self._seconds = [self._measured(block, measure_on) for block in blocks]
        logger.info("measured %d blocks, %d of them again", len(blocks), self.num_hits)

    def cost(self, part: Part) -> PartCost:
        """The cost of a part: bytes by the table, seconds as measured."""
        forward = backward = 0.0
        for block, seconds in zip(self.blocks, self._seconds, strict=True):
            if block.members <= part.members:
                forward, backward = forward + seconds[0], backward + seconds[1]
        modelled = super().cost(part)
        return dataclasses.replace(modelled, forward_s=forward, backward_s=backward)

    def _measured(self, block: Part, device: jax.Device) -> tuple[float, float]:
        """Seconds of a block's forward and of its backward without it."""
        program = _Program(self.components, block)
        key = hashlib.sha256(program.text.encode()).hexdigest()
        if key in self._by_hash:
            self.num_hits += 1
        else:
            self._by_hash[key] = _timed(program, device)
        return self._by_hash[key]


class _Program:
    """A block as a function of all that it reads."""

    def __init__(self, components: Components, block: Part):
        traced = components.traced
        equations = traced.program.jaxpr.eqns
        numbers = {n for each in block.members for n in components.equations[each]}
        read = {var for n in numbers for var in inputs_of(equations[n])}
        made = {var for n in numbers for var in equations[n].outvars}
        constants = set(traced.program.jaxpr.constvars)
        self.inputs = sorted(read - made - constants, key=_order_in(traced.program))
        left = {components.values[each].var for each in block.outputs}
        left |= made & set(traced.program.jaxpr.outvars)
        self.outputs = sorted(left, key=_order_in(traced.program))
        self.shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in self.inputs]
        self._traced = traced
        self.text = str(jax.make_jaxpr(self.forward)(*self.shapes))

    def forward(self, *values: Array) -> list:
        """What leaves the block."""
        program = self._traced.program
        known = dict(zip(self.inputs, values, strict=True))
        leaves = [known.get(var) for var in program.jaxpr.invars]
        return evaluate(program, leaves, self.outputs, known)

    def gradient(self, *values: Array) -> list:
        """The gradient of all that leaves the block, by all that enters it."""
        is_float = [jnp.issubdtype(value.dtype, jnp.floating) for value in values]

        def total(floats: Sequence[Array]) -> Array:
            rest = iter(floats)
            merged = [next(rest) if flag else value for flag, value in zip(is_float, values)]
            found = self.forward(*merged)
            floating = [x for x in found if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum((x.astype("float32").sum() for x in floating), jnp.float32(0))

        return jax.grad(total)([value for flag, value in zip(is_float, values) if flag])


def _order_in(program: jax.extend.core.ClosedJaxpr) -> Callable[[Var], int]:
    variables = [*program.jaxpr.invars]
    variables += [var for each in program.jaxpr.eqns for var in each.outvars]
    places = {var: place for place, var in enumerate(variables)}
    return places.__getitem__


def _timed(program: _Program, device: jax.Device) -> tuple[float, float]:
    """Median seconds of forward, and of the gradient less the forward; infinite without memory."""
    try:
        values = [
            jax.device_put(jnp.zeros(shape.shape, shape.dtype), device) for shape in program.shapes
        ]
        forward = _median_s(jax.jit(program.forward), values)
        both = _median_s(jax.jit(program.gradient), values)
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        return math.inf, math.inf
    return forward, max(both - forward, 0.0)


def _median_s(function: Callable, values: Sequence[Array]) -> float:
    call = functools.partial(function, *values)
    jax.block_until_ready(call())
    seconds = []
    for _ in range(NUM_TIMED):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))
