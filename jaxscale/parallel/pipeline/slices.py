"""Slices of a traced program: which of its equations a value needs, and running only those."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

# Equations that are a program of their own.
WRAPPERS = ("pjit", "jit", "closed_call", "checkpoint", "remat2")


def inputs_of(equation: JaxprEqn) -> list[Var]:
    """The variables that an equation reads, without its literals."""
    return [var for var in equation.invars if isinstance(var, Var)]


def makers_of(program: ClosedJaxpr) -> dict[Var, JaxprEqn]:
    """The equation that makes each variable; inputs and constants have none."""
    found = {}
    for equation in program.jaxpr.eqns:
        found.update(dict.fromkeys(equation.outvars, equation))
    return found


def program_inside(equation: JaxprEqn) -> ClosedJaxpr:
    """The program that an equation of WRAPPERS runs."""
    inner = equation.params["jaxpr"]
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def dependents(program: ClosedJaxpr, sources: Iterable[Var]) -> set[Var]:
    """The variables that depend on `sources`, themselves included."""
    found = set(sources)
    for equation in program.jaxpr.eqns:
        if not found.isdisjoint(inputs_of(equation)):
            found.update(equation.outvars)
    return found


def needed(
    program: ClosedJaxpr,
    wanted: Iterable[Any],
    known: Iterable[Var] = (),
) -> list[JaxprEqn]:
    """The equations, in order, that make `wanted` where `known` is given."""
    known = set(known)
    missing = {var for var in wanted if isinstance(var, Var)} - known
    found = []
    for equation in reversed(program.jaxpr.eqns):
        if not missing.isdisjoint(equation.outvars):
            found.append(equation)
            inputs = set(inputs_of(equation))
            missing.update(inputs - known)
    return found[::-1]


def evaluate(
    program: ClosedJaxpr,
    inputs: Sequence,
    wanted: Sequence,
    known: Mapping[Var, Any] | None = None,
) -> list:
    """The values of `wanted`, running only the equations that they need.

    Args:
        program: traced.
        inputs: of the program; one that is not needed may be None.
        wanted: variables, or literals.
        known: values of variables that need not be computed.
    """
    known = known or {}
    values = _given(program, inputs)
    values.update(known)
    for equation in needed(program, wanted, known):
        arguments = _read(values, equation.invars)
        outputs = apply(equation, arguments)
        values.update(zip(equation.outvars, outputs, strict=True))
    return _read(values, wanted)


def run_flat(program: ClosedJaxpr, inputs: Sequence) -> list:
    """Runs a program with those inside it written out; traced, it is one flat program."""
    values = _given(program, inputs)
    for equation in program.jaxpr.eqns:
        arguments = _read(values, equation.invars)
        if equation.primitive.name in WRAPPERS:
            outputs = run_flat(program_inside(equation), arguments)
        else:
            outputs = apply(equation, arguments)
        values.update(zip(equation.outvars, outputs, strict=True))
    return _read(values, program.jaxpr.outvars)


def _given(program: ClosedJaxpr, inputs: Sequence) -> dict[Var, Any]:
    """The values of a program's constants and inputs."""
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    return values


def apply(equation: JaxprEqn, arguments: Sequence) -> Sequence:
    """The outputs of one equation, always as a sequence."""
    parameters = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*arguments, **parameters)
    return outputs if equation.primitive.multiple_results else [outputs]


def _read(values: Mapping[Var, Any], variables: Sequence) -> list:
    return [_value_of(var, values) for var in variables]


def _value_of(var: Any, values: Mapping[Var, Any]) -> Any:
    return var.val if isinstance(var, Literal) else values[var]
