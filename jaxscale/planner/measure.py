"""Measured costs of any function's parts: a part takes as long as the blocks it is made of."""

import dataclasses
import logging
from collections.abc import Sequence

import jax
from jax.extend.core import Var

from jaxscale.parallel.pipeline.slices import evaluate, inputs_of
from jaxscale.planner.atomic import Components
from jaxscale.planner.cluster import Device
from jaxscale.planner.costs import BACKWARD_PASSES, ModelledCosts, Part, PartCost
from jaxscale.planner.timing import BlockTimes, Seconds
from jaxscale.types import Array

logger = logging.getLogger(__name__)


class MeasuredCosts(ModelledCosts):
    """Costs whose seconds are measured with all rows, and whose bytes are the table's.

    Args:
        components: of a traced loss.
        device: whose table says what is not measured.
        blocks: of the components; each distinct one runs once.
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
        self.blocks, times = blocks, BlockTimes(measure_on)
        self._seconds = [_seconds(components, block, times) for block in blocks]
        again = times.num_blocks - times.num_measured
        logger.info("measured %d blocks, %d of them again", times.num_blocks, again)

    def cost(self, part: Part) -> PartCost:
        """The cost of a part."""
        forward = backward = 0.0
        for block, seconds in zip(self.blocks, self._seconds, strict=True):
            if block.members <= part.members:
                forward += seconds.forward
                backward += seconds.backward
        modelled = super().cost(part)
        fixed = modelled.fixed_s
        return dataclasses.replace(
            modelled,
            forward_s=max(forward - fixed, 0.0),
            backward_s=max(backward - BACKWARD_PASSES * fixed, 0.0),
        )


def _seconds(components: Components, block: Part, times: BlockTimes) -> Seconds:
    """Of a block as a function of all that it reads."""
    program = components.traced.program
    numbers = {n for each in block.members for n in components.equations[each]}
    equations = [program.jaxpr.eqns[n] for n in numbers]
    read = {var for each in equations for var in inputs_of(each)}
    made = {var for each in equations for var in each.outvars}
    left = {components.values[each].var for each in block.outputs}
    left |= made & set(program.jaxpr.outvars)
    place = _places(program).__getitem__
    inputs = sorted(read - made - set(program.jaxpr.constvars), key=place)
    outputs = sorted(left, key=place)

    def forward(*values: Array) -> list:
        known = dict(zip(inputs, values, strict=True))
        leaves = [known.get(var) for var in program.jaxpr.invars]
        return evaluate(program, leaves, outputs, known)

    return times(forward, *(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in inputs))


def _places(program: jax.extend.core.ClosedJaxpr) -> dict[Var, int]:
    """Where each variable stands, so that blocks alike have their arguments in one order."""
    variables = [*program.jaxpr.invars]
    variables += [var for each in program.jaxpr.eqns for var in each.outvars]
    return {var: place for place, var in enumerate(variables)}
