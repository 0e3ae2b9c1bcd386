"""What parts of a program cost: by FLOPs and bytes over the device table."""

import dataclasses
import functools
import math
from collections.abc import Iterable

from jax.extend.core import JaxprEqn, Var

from jaxscale.parallel.pipeline.slices import inputs_of
from jaxscale.planner.atomic import Components
from jaxscale.planner.cluster import Device
from jaxscale.planner.trace import HEAVY, bytes_of

LAUNCH_S = 4e-6  # of a kernel, without which small equations would cost nothing
BACKWARD_PASSES = 2  # times the forward's: the gradients of inputs and of parameters


@dataclasses.dataclass(frozen=True)
class PartCost:
    """What some components cost for the whole traced batch on one device.

    Args:
        forward_s, backward_s: seconds; the backward without recomputing the forward.
        fixed_s: seconds of a forward beside that, whatever its rows: launches, and parameters that
            are read. A backward has twice as many.
        params_bytes: of the parameters they read.
        input_bytes: of what comes from other components and the batch.
        output_bytes: of what others read.
        kept_bytes: of what the forward makes, at most as much as the backward reads.
    """

    forward_s: float
    backward_s: float
    fixed_s: float
    params_bytes: float
    input_bytes: float
    output_bytes: float
    kept_bytes: float


@dataclasses.dataclass(frozen=True)
class Part:
    """Some components with what passes between them and the others.

    Args:
        members: numbers of the components.
        flops: of their forward.
        num_kernels: matmuls, convolutions and loops; what is elementwise is fused with them.
        inputs: numbers of the values that they read and do not make.
        outputs: numbers of the values that they make and others read.
        params: parameters that they read.
        made_bytes: of all that they make.
    """

    members: frozenset[int]
    flops: float
    num_kernels: int
    inputs: frozenset[int]
    outputs: frozenset[int]
    params: frozenset[Var]
    made_bytes: float


class ModelledCosts:
    """Costs by FLOPs and bytes: what is elementwise is fused, so only what leaves a part is moved.

    Args:
        components: of a traced loss.
        device: on which they run.
        flops_per_s: of its matmuls; None for those of 16 bits.
    """

    def __init__(self, components: Components, device: Device):
        self.components, self.device = components, device
        self._params = set(components.traced.param_vars)
        jaxpr = components.traced.program.jaxpr
        self._flops = [flops_of(equation) for equation in jaxpr.eqns]
        self._bandwidth = device.memory_bandwidth * device.memory_share

    @functools.cached_property
    def atoms(self) -> list[Part]:
        """Each component as a part."""
        num = len(self.components.equations)
        inputs: list[set[int]] = [set() for _ in range(num)]
        outputs: list[set[int]] = [set() for _ in range(num)]
        for number, value in enumerate(self.components.values):
            outputs[value.producer].add(number)
            for consumer in value.consumers:
                inputs[consumer].add(number)
        return [self._atom(each, inputs[each], outputs[each]) for each in range(num)]

    def _atom(self, number: int, inputs: set[int], outputs: set[int]) -> Part:
        eqns = self.components.traced.program.jaxpr.eqns
        equations = [eqns[each] for each in self.components.equations[number]]
        read = {var for each in equations for var in inputs_of(each)}
        return Part(
            members=frozenset([number]),
            flops=sum(self._flops[each] for each in self.components.equations[number]),
            num_kernels=sum(each.primitive.name in HEAVY for each in equations),
            inputs=frozenset(inputs),
            outputs=frozenset(outputs),
            params=frozenset(read & self._params),
            made_bytes=sum(map(bytes_of, equations[-1].outvars)),
        )

    def merged(self, parts: Iterable[Part]) -> Part:
        """Several parts as one."""
        parts = list(parts)
        members = frozenset[int]().union(*(part.members for part in parts))
        made = frozenset[int]().union(*(part.outputs for part in parts))
        values = self.components.values
        return Part(
            members=members,
            flops=sum(part.flops for part in parts),
            num_kernels=sum(part.num_kernels for part in parts),
            inputs=frozenset[int]().union(*(part.inputs for part in parts)) - made,
            outputs=frozenset(
                each for each in made if not members.issuperset(values[each].consumers)
            ),
            params=frozenset[Var]().union(*(part.params for part in parts)),
            made_bytes=sum(part.made_bytes for part in parts),
        )

    def bytes_of(self, values: Iterable[int]) -> int:
        """Bytes of values by number."""
        return sum(self.components.values[each].num_bytes for each in values)

    def seconds(self, part: Part) -> float:
        """Seconds of a part's forward and backward for the whole batch."""
        cost = self.cost(part)
        return cost.forward_s + cost.backward_s + (1 + BACKWARD_PASSES) * cost.fixed_s

    def cost(self, part: Part) -> PartCost:
        """The cost of a part."""
        device = self.device
        input_bytes, output_bytes = self.bytes_of(part.inputs), self.bytes_of(part.outputs)
        params_bytes = sum(map(bytes_of, part.params))
        forward = part.flops / (device.matmul_flops * device.matmul_share)
        forward += (input_bytes + output_bytes) / self._bandwidth
        return PartCost(
            forward_s=forward,
            backward_s=BACKWARD_PASSES * forward,
            fixed_s=max(part.num_kernels, 1) * LAUNCH_S + params_bytes / self._bandwidth,
            params_bytes=params_bytes,
            input_bytes=input_bytes,
            output_bytes=output_bytes,
            kept_bytes=part.made_bytes,
        )


def flops_of(equation: JaxprEqn) -> float:
    """FLOPs of an equation: two a multiply-add of matmuls and convolutions, else one an element."""
    name, params = equation.primitive.name, equation.params
    made = sum(math.prod(getattr(var.aval, "shape", ())) for var in equation.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * made * math.prod(shape[dim] for dim in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * made * math.prod(kernel) / out_features
    inside = [each for each in params.values() if hasattr(getattr(each, "jaxpr", each), "eqns")]
    if inside:
        total = sum(flops_of(e) for each in inside for e in getattr(each, "jaxpr", each).eqns)
        return total * params.get("length", 1)
    return float(made)
