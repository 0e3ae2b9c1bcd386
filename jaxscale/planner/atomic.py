"""Atomic subcomponents: the smallest parts of a program that a stage may hold.

Source: Tanaka et al. 2021, RaNNC (arXiv 2103.16063), its first phase.
"""

import dataclasses
import functools

from jax.extend.core import Var

from jaxscale.parallel.pipeline.slices import inputs_of
from jaxscale.planner.trace import Traced, bytes_of


@dataclasses.dataclass(frozen=True)
class Value:
    """What one component makes and others read.

    Args:
        var: of the program.
        producer: number of the component.
        consumers: numbers of those that read it, in order, without the producer.
        num_bytes: its size.
    """

    var: Var
    producer: int
    consumers: tuple[int, ...]
    num_bytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Components:
    """The components of a traced loss, numbered in the order in which they can run.

    Args:
        traced: the loss.
        equations: of each component the numbers of its equations; the last depends on the batch,
            the others make constants of it and may stand in other components too.
        values: all that pass between components.
    """

    traced: Traced
    equations: tuple[tuple[int, ...], ...]
    values: tuple[Value, ...]

    @functools.cached_property
    def successors(self) -> list[set[int]]:
        """Components that read what each makes."""
        found: list[set[int]] = [set() for _ in self.equations]
        for value in self.values:
            found[value.producer].update(value.consumers)
        return found


def make_components(traced: Traced) -> Components:
    """One component for each equation that depends on the batch, with the constants it reads.

    What depends on parameters alone, such as a transposed or converted weight, is cloned into every
    component that reads it, so that no stage waits for another to make it.
    """
    eqns = traced.program.jaxpr.eqns
    depends = traced.depends_on_batch
    constants = _constants_of(traced)
    owner: dict[Var, int] = {}
    equations: list[tuple[int, ...]] = []
    consumers: dict[Var, list[int]] = {}
    for number, equation in enumerate(eqns):
        if not depends[number]:
            continue
        component = len(equations)
        clones = set[int]().union(*(constants.get(var, ()) for var in inputs_of(equation)))
        equations.append((*sorted(clones), number))
        for var in dict.fromkeys(inputs_of(equation)):
            if var in owner:
                consumers.setdefault(var, []).append(component)
        owner.update(dict.fromkeys(equation.outvars, component))
    values = tuple(
        Value(var, owner[var], tuple(readers), bytes_of(var)) for var, readers in consumers.items()
    )
    return Components(traced, tuple(equations), values)


def _constants_of(traced: Traced) -> dict[Var, frozenset[int]]:
    """For each variable that does not depend on the batch the equations that make it."""
    found: dict[Var, frozenset[int]] = {}
    for number, equation in enumerate(traced.program.jaxpr.eqns):
        if traced.depends_on_batch[number]:
            continue
        before = (found.get(var, frozenset()) for var in inputs_of(equation))
        needed = frozenset[int]().union(*before) | {number}
        found.update(dict.fromkeys(equation.outvars, needed))
    return found
