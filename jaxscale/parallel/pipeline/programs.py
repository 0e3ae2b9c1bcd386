"""A pipeline stage as three programs: its forward, its input's gradient and its weights' gradient.

The pullback of any stage is one straight program. The backward of the pipeline is the slice of it
that the input's gradient needs; the weight gradient is the rest. The programs pass each other
arrays in two hops:

- The forward keeps residuals for the other two, but only those that depend on the input. The
  others (parameters in another type, rotary tables, masks) are recomputed where they are needed. So
  is what is elementwise in what is kept, such as an activation or a copy in a wider type: XLA fuses
  it with the operation that reads it, as it would if forward and backward were one program.
- The backward leaves for the weight gradient the intermediate values that both need.

Source: Qi et al. 2023 (arXiv 2401.10241), section 2, by slicing the pullback instead of rewriting
    layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from jaxscale.parallel.pipeline.slices import (
    WRAPPERS,
    dependents,
    evaluate,
    inputs_of,
    makers_of,
    needed,
    program_inside,
    run_flat,
)

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
class StagePrograms:
    """A stage's three programs, for arrays of the shapes that `make_stage_programs` was given.

    Args:
        forward: (params, x, batch) -> (y, aux, kept).
        backward: (params, batch, kept, dy) -> (dx, extra), where `extra` is what the weight
            gradient needs beside `kept`.
        weight: (params, batch, kept, extra) -> the gradient of params.
        kept: shapes of what the forward keeps.
        extra: shapes of what the backward leaves for the weight gradient.
    """

    forward: Callable[..., tuple[Any, Any, tuple]]
    backward: Callable[..., tuple[Any, tuple]]
    weight: Callable[..., Any]
    kept: tuple
    extra: tuple


def make_stage_programs(
    stage: Callable,
    params: Any,
    x: Any,
    batch: Any,
    *,
    is_deep: bool,
) -> StagePrograms:
    """The programs of stage(params, x, batch) -> (y, aux), where only y is differentiated.

    Args:
        stage: traced once; loops (`lax.scan`) in it are not taken apart: their whole gradient
            belongs to the backward.
        params, x, batch: arguments or their shapes.
        is_deep: whether to look into checkpointed and jitted parts too, so that the weight gradient
            is as large as can be. Otherwise they stay in one piece and belong to the backward; a
            checkpointed part then keeps the barrier that delays its recomputation.
    """
    forward = _trace_forward(stage, params, x, batch)
    pullback = _trace_pullback(forward, is_deep=is_deep)

    def run_backward(
        params: Any,
        batch: Any,
        kept: Sequence,
        dy: Any,
    ) -> tuple[Any, tuple]:
        residuals = forward.residuals(params, batch, kept)
        return pullback.input_gradient(residuals, dy)

    def run_weight(
        params: Any,
        batch: Any,
        kept: Sequence,
        extra: Sequence,
    ) -> Any:
        residuals = forward.residuals(params, batch, kept)
        return pullback.weight_gradient(residuals, extra)

    return StagePrograms(
        forward=forward.run,
        backward=run_backward,
        weight=run_weight,
        kept=_shapes_of(forward.kept),
        extra=_shapes_of(pullback.extra),
    )


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The traced forward.

    Args:
        program: (params, x, batch) -> (y, aux, residuals), all flat.
        outputs: shapes of (y, aux).
        pullback: the function that the residuals belong to, with their shapes in their places.
        num_params, num_x: leaves of the first two arguments.
    """

    program: ClosedJaxpr
    outputs: tuple[Any, Any]
    pullback: Any
    num_params: int
    num_x: int

    @property
    def _num_outputs(self) -> int:
        return len(jax.tree.leaves(self.outputs))

    @functools.cached_property
    def kept(self) -> list[Var]:
        """Variables of which, beside params and batch, all residuals can be recomputed."""
        after_params = self.program.jaxpr.invars[self.num_params :]
        of_x = dependents(self.program, after_params[: self.num_x])
        residuals = self.program.jaxpr.outvars[self._num_outputs :]
        wanted = [var for var in residuals if isinstance(var, Var) and var in of_x]
        return _sources(self.program, wanted, of_x)

    def run(self, params: Any, x: Any, batch: Any) -> tuple[Any, Any, tuple]:
        """(y, aux, values of `kept`)."""
        inputs = jax.tree.leaves((params, x, batch))
        outputs = self.program.jaxpr.outvars[: self._num_outputs]
        values = evaluate(self.program, inputs, [*outputs, *self.kept])
        structure = jax.tree.structure(self.outputs)
        y, aux = jax.tree.unflatten(structure, values[: self._num_outputs])
        return y, aux, tuple(values[self._num_outputs :])

    def residuals(self, params: Any, batch: Any, kept: Sequence) -> list:
        """All residuals, recomputed from what is kept."""
        no_x = [None] * self.num_x
        inputs = [*jax.tree.leaves(params), *no_x, *jax.tree.leaves(batch)]
        known = dict(zip(self.kept, kept, strict=True))
        wanted = self.program.jaxpr.outvars[self._num_outputs :]
        return evaluate(self.program, inputs, wanted, known)


def _trace_forward(
    stage: Callable,
    params: Any,
    x: Any,
    batch: Any,
) -> _Forward:
    def run(params: Any, x: Any, batch: Any) -> tuple[Any, Any, Any]:
        def of_batch(params: Any, x: Any) -> tuple[Any, Any]:
            return stage(params, x, batch)

        y, pullback, aux = jax.vjp(of_batch, params, x, has_aux=True)
        return y, aux, pullback  # a pytree, whose leaves are the residuals

    trace = jax.make_jaxpr(run, return_shape=True)
    program, shapes = trace(params, x, batch)
    y, aux, pullback = shapes
    return _Forward(
        program=program,
        outputs=(y, aux),
        pullback=pullback,
        num_params=len(jax.tree.leaves(params)),
        num_x=len(jax.tree.leaves(x)),
    )


@dataclasses.dataclass(frozen=True)
class _Pullback:
    """The traced pullback.

    Args:
        program: (residuals, dy) -> (dparams, dx), all flat.
        gradients: shapes of (dparams, dx).
        num_residuals: leaves of the first argument.
    """

    program: ClosedJaxpr
    gradients: tuple[Any, Any]
    num_residuals: int

    @property
    def _dparams(self) -> list:
        num = len(jax.tree.leaves(self.gradients[0]))
        return self.program.jaxpr.outvars[:num]

    @property
    def _dx(self) -> list:
        num = len(jax.tree.leaves(self.gradients[0]))
        return self.program.jaxpr.outvars[num:]

    @functools.cached_property
    def extra(self) -> list[Var]:
        """Variables that both gradients need, beside the residuals."""
        return _shared(self.program, self._dx, self._dparams, self.num_residuals)

    def input_gradient(self, residuals: Sequence, dy: Any) -> tuple[Any, tuple]:
        """(dx, values of `extra`)."""
        inputs = [*residuals, *jax.tree.leaves(dy)]
        wanted = [*self._dx, *self.extra]
        values = evaluate(self.program, inputs, wanted)
        num = len(self._dx)
        structure = jax.tree.structure(self.gradients[1])
        dx = jax.tree.unflatten(structure, values[:num])
        return dx, tuple(values[num:])

    def weight_gradient(self, residuals: Sequence, extra: Sequence) -> Any:
        """The gradient of params, without dy: what needs it is in `extra`."""
        num_dy = len(self.program.jaxpr.invars) - self.num_residuals
        inputs = [*residuals, *[None] * num_dy]
        known = dict(zip(self.extra, extra, strict=True))
        values = evaluate(self.program, inputs, self._dparams, known)
        structure = jax.tree.structure(self.gradients[0])
        return jax.tree.unflatten(structure, values)


def _trace_pullback(forward: _Forward, *, is_deep: bool) -> _Pullback:
    residuals, structure = jax.tree.flatten(forward.pullback)
    y, _ = forward.outputs

    def pull(residuals: list, dy: Any) -> tuple[Any, Any]:
        pullback = jax.tree.unflatten(structure, residuals)
        return pullback(dy)

    program, gradients = jax.make_jaxpr(pull, return_shape=True)(residuals, y)
    if is_deep:
        # A wrapped program is one equation, all of which would belong to the backward.
        flat = functools.partial(_run_flat, program)
        program = jax.make_jaxpr(flat)(*program.in_avals)
    return _Pullback(program, gradients, len(residuals))


def _run_flat(program: ClosedJaxpr, *inputs: Any) -> list:
    return run_flat(program, inputs)


def _sources(
    program: ClosedJaxpr,
    residuals: Sequence[Var],
    of_x: set[Var],
) -> list[Var]:
    """What to keep so that elementwise operations make `residuals` of it.

    Args:
        program: the forward.
        residuals: those that depend on x.
        of_x: all variables that depend on x; the others can be recomputed in any case.
    """
    maker_of = makers_of(program)
    position = _positions(program)
    kept: dict[Var, None] = {}  # in the order of their making
    made: set[Var] = set()

    def can_be_made(var: Var) -> bool:
        """Whether elementwise operations make it of what is kept so far."""
        if var in kept or var in made:
            return True
        if var not in maker_of or not _is_elementwise(maker_of[var]):
            return False
        sources = [source for source in inputs_of(maker_of[var]) if source in of_x]
        if not all(map(can_be_made, sources)):
            return False
        made.add(var)
        return True

    # In the order of the program: what is kept early may make a later residual, never the reverse.
    distinct = dict.fromkeys(residuals)
    for residual in sorted(distinct, key=lambda var: position.get(var, -1)):
        # A bfloat16 activation widened to float32 is kept in bfloat16, and widened again.
        var = _narrowest(residual, maker_of, ("convert_element_type",))
        if not can_be_made(var):
            kept[var] = None
    return list(kept)


def _positions(program: ClosedJaxpr) -> dict[Var, int]:
    """The place among the equations of the one that makes each variable."""
    found = {}
    for number, equation in enumerate(program.jaxpr.eqns):
        found.update(dict.fromkeys(equation.outvars, number))
    return found


def _is_elementwise(equation: JaxprEqn) -> bool:
    if equation.primitive.name in WRAPPERS:
        inner = program_inside(equation).jaxpr
        return all(map(_is_elementwise, inner.eqns))
    return equation.primitive.name in ELEMENTWISE


def _shared(
    program: ClosedJaxpr,
    dx: Sequence[Any],
    dparams: Sequence[Any],
    num_residuals: int,
) -> list[Var]:
    """What `dparams` needs of all that is made or received for `dx`, without the residuals."""
    # The inputs after the residuals are dy, which only the backward receives.
    made = set(program.jaxpr.invars[num_residuals:])
    for equation in needed(program, dx):
        made.update(equation.outvars)
    uses = []
    for equation in needed(program, dparams, made):
        uses += inputs_of(equation)
    uses += [var for var in dparams if isinstance(var, Var)]
    maker_of = makers_of(program)
    repeats = ("convert_element_type", "optimization_barrier")
    # A dict keeps the order and drops what is used twice.
    narrow = {_narrowest(var, maker_of, repeats): None for var in uses if var in made}
    return [var for var in narrow if var in made]


def _narrowest(
    var: Var,
    maker_of: Mapping[Var, JaxprEqn],
    repeats: Sequence[str],
) -> Var:
    """The same value in as few bytes as possible, before operations that only repeat it.

    Args:
        var: whose value it is.
        maker_of: the equation that makes each variable.
        repeats: names of such operations: conversions to a wider type, barriers.
    """
    while var in maker_of and maker_of[var].primitive.name in repeats:
        equation = maker_of[var]
        output = equation.outvars.index(var)
        source = equation.invars[output]
        if not isinstance(source, Var) or _itemsize(source) > _itemsize(var):
            break
        var = source
    return var


def _itemsize(var: Var) -> int:
    return var.aval.dtype.itemsize


def _shapes_of(variables: Sequence[Var]) -> tuple[jax.ShapeDtypeStruct, ...]:
    avals = [var.aval for var in variables]
    return tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
