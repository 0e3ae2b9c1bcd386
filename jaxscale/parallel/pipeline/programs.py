"""A pipeline stage as three programs: F, its forward; B, its input's gradient; W, its weights' gradient.

The pullback of any stage is one straight program. What the input's gradient needs of it is B, the
rest is W. Of the forward's residuals, those that depend on the input are kept from F on; the others
(parameters in another type, rotary tables, masks) are made again, and so is what is elementwise in
what is kept (an activation, a wider copy): XLA fuses it with what reads it, as it would where
forward and backward are one program.

Source: Qi et al. 2023 (arXiv 2401.10241), section 2, by slicing the pullback instead of rewriting
    layers.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

WRAPPERS = (
    "pjit",
    "jit",
    "closed_call",
    "checkpoint",
    "remat2",
)  # equations that are a program of their own

ELEMENTWISE = {
    "add",
    "add_any",
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "div",
    "erf",
    "exp",
    "integer_pow",
    "logistic",
    "max",
    "min",
    "mul",
    "neg",
    "pow",
    "reshape",
    "rsqrt",
    "select_n",
    "sqrt",
    "square",
    "squeeze",
    "stop_gradient",
    "sub",
    "tanh",
}


@dataclasses.dataclass(frozen=True)
class Split:
    """A stage in three parts; each runs on arrays of the shapes that `split` was given.

    Args:
        forward: (params, x, batch) -> (y, aux, kept).
        backward: (params, batch, kept, dy) -> (dx, extra), where `extra` is what W needs beside
            `kept`.
        weight: (params, batch, kept, extra) -> the gradient of params.
        kept: shapes of what F keeps.
        extra: shapes of what B leaves for W.
    """

    forward: Callable[..., tuple[Any, Any, tuple]]
    backward: Callable[..., tuple[Any, tuple]]
    weight: Callable[..., Any]
    kept: tuple
    extra: tuple


def split(stage: Callable, params: Any, x: Any, batch: Any, *, is_deep: bool) -> Split:
    """Splits stage(params, x, batch) -> (y, aux), where y is differentiated and aux is not.

    Args:
        stage: traced once; loops (`lax.scan`) in it are not taken apart: their whole gradient
            belongs to B.
        params, x, batch: arguments or their shapes.
        is_deep: look into checkpointed and jitted parts too, so that W is as large as can be;
            without it they stay whole (a checkpointed part keeps the barrier that holds its
            recomputation back) and belong to B.
    """
    structure = {}

    def run(params: Any, x: Any, batch: Any) -> tuple[Any, Any, list]:
        y, pullback, aux = jax.vjp(
            lambda params, x: stage(params, x, batch), params, x, has_aux=True
        )
        residuals, structure["pullback"] = jax.tree.flatten(pullback)
        return y, aux, residuals

    forward, (y, aux, residuals) = jax.make_jaxpr(run, return_shape=True)(params, x, batch)
    made = forward.jaxpr.outvars[len(forward.jaxpr.outvars) - len(residuals) :]
    num_params, num_x = len(jax.tree.leaves(params)), len(jax.tree.leaves(x))
    of_x = _reach(forward, forward.jaxpr.invars[num_params : num_params + num_x])
    kept_vars = _sources(
        forward, [var for var in made if isinstance(var, Var) and var in of_x], of_x
    )

    def all_residuals(params: Any, batch: Any, kept: Sequence) -> list:
        inputs = [*jax.tree.leaves(params), *(None,) * num_x, *jax.tree.leaves(batch)]
        return _evaluate(forward, inputs, made, dict(zip(kept_vars, kept, strict=True)))

    def pull(residuals: list, dy: Any) -> tuple[Any, Any]:
        return jax.tree.unflatten(structure["pullback"], residuals)(dy)

    pullback, gradients = jax.make_jaxpr(pull, return_shape=True)(residuals, y)
    if is_deep:
        pullback = jax.make_jaxpr(lambda *inputs: _flattened(pullback, inputs))(*pullback.in_avals)
    dparams, dx = (
        pullback.jaxpr.outvars[: len(jax.tree.leaves(gradients[0]))],
        pullback.jaxpr.outvars[-num_x:],
    )
    extra = _between(pullback, dx, dparams, len(residuals))

    def run_forward(params: Any, x: Any, batch: Any) -> tuple[Any, Any, tuple]:
        wanted = forward.jaxpr.outvars[: len(forward.jaxpr.outvars) - len(residuals)]
        outputs = _evaluate(forward, jax.tree.leaves((params, x, batch)), [*wanted, *kept_vars])
        y_aux = jax.tree.unflatten(jax.tree.structure((y, aux)), outputs[: len(wanted)])
        return *y_aux, tuple(outputs[len(wanted) :])

    def run_backward(params: Any, batch: Any, kept: Sequence, dy: Any) -> tuple[Any, tuple]:
        inputs = [*all_residuals(params, batch, kept), *jax.tree.leaves(dy)]
        outputs = _evaluate(pullback, inputs, [*dx, *extra])
        return jax.tree.unflatten(jax.tree.structure(gradients[1]), outputs[:num_x]), tuple(
            outputs[num_x:]
        )

    def run_weight(params: Any, batch: Any, kept: Sequence, extra_values: Sequence) -> Any:
        inputs = [*all_residuals(params, batch, kept), *(None,) * len(jax.tree.leaves(y))]
        known = dict(zip(extra, extra_values, strict=True))
        return jax.tree.unflatten(
            jax.tree.structure(gradients[0]), _evaluate(pullback, inputs, dparams, known)
        )

    kept, extra_shapes = (
        tuple(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in variables)
        for variables in (kept_vars, extra)
    )
    return Split(run_forward, run_backward, run_weight, kept, extra_shapes)


def _sources(program: ClosedJaxpr, residuals: Sequence[Var], of_x: set[Var]) -> list[Var]:
    """What to keep, of what depends on the input, so that elementwise operations make `residuals` of it."""
    makers = {
        var: (i, equation)
        for i, equation in enumerate(program.jaxpr.eqns)
        for var in equation.outvars
    }
    kept: dict[Var, None] = {}
    made: set[Var] = set()

    def need(var: Var) -> list[Var]:
        return [var for var in _inputs(makers[var][1]) if var in of_x]

    def is_made(var: Var) -> bool:
        if var not in kept and var not in made:
            if (
                var not in makers
                or not _is_elementwise(makers[var][1])
                or not all(map(is_made, need(var)))
            ):
                return False
            made.add(var)
        return True

    for var in sorted(
        dict.fromkeys(residuals), key=lambda var: makers[var][0] if var in makers else -1
    ):
        while var in makers and makers[var][1].primitive.name == "convert_element_type":
            (source,) = need(var)
            if source.aval.dtype.itemsize > var.aval.dtype.itemsize:
                break
            var = source  # the same value in fewer bytes
        if not is_made(var):
            kept[var] = None
    return list(kept)


def _is_elementwise(equation: JaxprEqn) -> bool:
    if equation.primitive.name in WRAPPERS:
        inner = equation.params["jaxpr"]
        return all(
            map(_is_elementwise, (inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner).eqns)
        )
    return equation.primitive.name in ELEMENTWISE


def _reach(program: ClosedJaxpr, sources: Iterable[Var]) -> set[Var]:
    """The variables that depend on `sources`, themselves included."""
    reached = set(sources)
    for equation in program.jaxpr.eqns:
        if any(var in reached for var in _inputs(equation)):
            reached.update(equation.outvars)
    return reached


def _needed(
    program: ClosedJaxpr, wanted: Iterable[Any], known: Iterable[Var] = ()
) -> list[JaxprEqn]:
    """The equations that `wanted` needs, in order, where `known` is given."""
    known = set(known)
    needed = {var for var in wanted if isinstance(var, Var)} - known
    found = []
    for equation in reversed(program.jaxpr.eqns):
        if any(var in needed for var in equation.outvars):
            found.append(equation)
            needed.update(set(_inputs(equation)) - known)
    return found[::-1]


def _between(
    program: ClosedJaxpr, first: Sequence[Any], second: Sequence[Any], num_kept: int
) -> list[Var]:
    """What `second` needs of what is made or received for `first`; the first `num_kept` inputs are there anyway."""
    made = {var for equation in _needed(program, first) for var in equation.outvars}
    made |= set(program.jaxpr.invars[num_kept:])
    uses = [var for equation in _needed(program, second, made) for var in _inputs(equation)]
    uses += [var for var in second if isinstance(var, Var)]
    makers = {var: equation for equation in program.jaxpr.eqns for var in equation.outvars}

    def narrow(var: Var) -> Var:
        """The same value before it was converted to a wider type or held back by a barrier."""
        while var in makers and makers[var].primitive.name in (
            "convert_element_type",
            "optimization_barrier",
        ):
            source = makers[var].invars[makers[var].outvars.index(var)]
            if not isinstance(source, Var) or source.aval.dtype.itemsize > var.aval.dtype.itemsize:
                break
            var = source
        return var

    narrowed = dict.fromkeys(narrow(var) for var in uses if var in made)
    return [var for var in narrowed if var in made]


def _inputs(equation: JaxprEqn) -> list[Var]:
    return [var for var in equation.invars if isinstance(var, Var)]


def _evaluate(
    program: ClosedJaxpr, inputs: Sequence, wanted: Sequence, known: dict[Var, Any] | None = None
) -> list:
    """The values of `wanted`, running only what they need; inputs that are not needed may be None."""
    values = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values |= dict(zip(program.jaxpr.invars, inputs, strict=True)) | (known or {})
    for equation in _needed(program, wanted, known or ()):
        values |= zip(
            equation.outvars, _apply(equation, _read(values, equation.invars)), strict=True
        )
    return _read(values, wanted)


def _flattened(program: ClosedJaxpr, inputs: Sequence) -> list:
    """Runs a program with the wrapped ones inside it written out; traced, it is one flat program."""
    values = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values |= zip(program.jaxpr.invars, inputs, strict=True)
    for equation in program.jaxpr.eqns:
        arguments = _read(values, equation.invars)
        if equation.primitive.name in WRAPPERS:
            inner = equation.params["jaxpr"]
            outputs = _flattened(
                inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()), arguments
            )
        else:
            outputs = _apply(equation, arguments)
        values |= zip(equation.outvars, outputs, strict=True)
    return _read(values, program.jaxpr.outvars)


def _apply(equation: JaxprEqn, arguments: Sequence) -> Sequence:
    parameters = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*arguments, **parameters)
    return outputs if equation.primitive.multiple_results else [outputs]


def _read(values: dict[Var, Any], variables: Sequence) -> list:
    return [var.val if isinstance(var, Literal) else values[var] for var in variables]
