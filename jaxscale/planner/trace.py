"""Any function of JAX as one flat program, whose equations a planner can spread over stages."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from jaxscale.parallel.pipeline.slices import WRAPPERS, apply, inputs_of, program_inside
from jaxscale.types import InputError

logger = logging.getLogger(__name__)

CUSTOM_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
HEAVY = ("dot_general", "conv_general_dilated", "ragged_dot", "scan", "while")
MAX_UNROLLED = 512  # rounds of a scan that are written out; a longer one stays one equation


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A loss as a flat program.

    Args:
        program: of the leaves of (params, batch), with one output.
        params: tree of shapes.
        batch: tree of shapes.
    """

    program: ClosedJaxpr
    params: Any
    batch: Any

    @property
    def num_params(self) -> int:
        """Leaves of the parameters, the program's first inputs."""
        return len(jax.tree.leaves(self.params))

    @property
    def param_vars(self) -> list[Var]:
        """The inputs that are parameters."""
        return self.program.jaxpr.invars[: self.num_params]

    @property
    def batch_vars(self) -> list[Var]:
        """The inputs that are the batch."""
        return self.program.jaxpr.invars[self.num_params :]

    @functools.cached_property
    def depends_on_batch(self) -> list[bool]:
        """For each equation whether it depends on the batch; one that makes the loss counts too."""
        known = set(self.batch_vars)
        outputs = set(self.program.jaxpr.outvars)
        found = []
        for equation in self.program.jaxpr.eqns:
            depends = not known.isdisjoint(inputs_of(equation))
            if depends:
                known.update(equation.outvars)
            found.append(depends or not outputs.isdisjoint(equation.outvars))
        return found


def trace(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
) -> Traced:
    """Traces a loss and writes out the programs inside it.

    Calls of jit and of `jax.checkpoint` are written out, and so are loops of a fixed length. A
    function with a derivative of its own that holds at most one matmul, convolution or loop, such
    as an activation, stays whole and keeps its derivative. A larger one is written out too, for a
    stage could hold no part of it otherwise; from then on its parts are differentiated as they are,
    which is logged.

    Args:
        loss: loss(params, batch) -> scalar.
        params: arrays or shapes that are differentiated.
        batch: arrays or shapes.
    Raises:
        InputError: the function cannot be traced, or returns no scalar.
    """
    shapes = jax.tree.map(_shape_of, (params, batch))
    leaves, structure = jax.tree.flatten(shapes)

    def flat(*leaves: Any) -> Any:
        return loss(*jax.tree.unflatten(structure, leaves))

    try:
        program = jax.make_jaxpr(flat)(*leaves)
    except (TypeError, jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        first_line = str(error).strip().partition("\n")[0]
        expected = f"a function that jax.jit could trace ({first_line})"
        raise InputError("loss", _name_of(loss), expected) from error
    outputs = program.out_avals
    if len(outputs) != 1 or outputs[0].shape != ():
        given = ", ".join(map(str, outputs))
        raise InputError("loss", given, "a function that returns one scalar")
    written = jax.make_jaxpr(functools.partial(_write_out, program))(*leaves)
    return Traced(written, *shapes)


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype))


def _name_of(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _write_out(program: ClosedJaxpr, *inputs: Any) -> list:
    """Runs a program with those inside it written out; traced, it is one flat program."""
    jaxpr = program.jaxpr
    values: dict[Var, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(variables: Sequence) -> list:
        return [var.val if isinstance(var, Literal) else values[var] for var in variables]

    for equation in jaxpr.eqns:
        outputs = _written(equation, read(equation.invars))
        values.update(zip(equation.outvars, outputs, strict=True))
    return read(jaxpr.outvars)


def _written(equation: JaxprEqn, arguments: list) -> Sequence:
    """The outputs of an equation, in parts if it has a program inside that is worth it."""
    name = equation.primitive.name
    if name in WRAPPERS:
        return _write_out(program_inside(equation), *arguments)
    if name in CUSTOM_DERIVATIVES:
        inside = _custom_program(equation)
        if _num_heavy(inside) > 1:
            logger.info("%s is planned in parts, without its own derivative", _label(equation))
            return _write_out(inside, *arguments)
    if name == "scan" and equation.params["length"] <= MAX_UNROLLED:
        return _unrolled(equation, arguments)
    return apply(equation, arguments)


def _custom_program(equation: JaxprEqn) -> ClosedJaxpr:
    inside = equation.params.get("call_jaxpr") or equation.params["fun_jaxpr"]
    return inside if isinstance(inside, ClosedJaxpr) else ClosedJaxpr(inside, ())


def _label(equation: JaxprEqn) -> str:
    return f"{equation.primitive.name} {equation.params.get('name', '')}".strip()


def _num_heavy(program: ClosedJaxpr) -> int:
    """Matmuls, convolutions and loops in a program and those inside it."""
    total = 0
    for equation in program.jaxpr.eqns:
        name = equation.primitive.name
        if name in HEAVY:
            total += 1
        elif name in WRAPPERS:
            total += _num_heavy(program_inside(equation))
        elif name in CUSTOM_DERIVATIVES:
            total += _num_heavy(_custom_program(equation))
    return total


def _unrolled(equation: JaxprEqn, arguments: list) -> list:
    """The outputs of a scan, round after round."""
    body, length = program_inside(equation), equation.params["length"]
    num_carry = _num_alike(equation.outvars, body.jaxpr.outvars)
    # Constants and carry come first, in the shapes that a round has.
    num_whole = _num_alike(equation.invars, body.jaxpr.invars)
    consts = arguments[: num_whole - num_carry]
    carry = arguments[num_whole - num_carry : num_whole]
    stacks = arguments[num_whole:]
    rounds = range(length)
    rows: list[list] = [[] for _ in rounds]
    for index in reversed(rounds) if equation.params["reverse"] else rounds:
        items = [jax.lax.index_in_dim(stack, index, keepdims=False) for stack in stacks]
        outputs = _write_out(body, *consts, *carry, *items)
        carry, rows[index] = outputs[:num_carry], outputs[num_carry:]
    stacked = [jax.numpy.stack(column) for column in zip(*rows, strict=True)]
    return [*carry, *stacked]


def _num_alike(outside: Sequence, inside: Sequence) -> int:
    """Of a scan's variables those that have no dim of rounds."""
    pairs = zip(outside, inside, strict=True)
    return sum(outer.aval.ndim == inner.aval.ndim for outer, inner in pairs)


def bytes_of(var: Any) -> int:
    """Bytes of a variable's value."""
    aval = var.aval
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0)
