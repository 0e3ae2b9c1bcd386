"""What a configuration binds, by scope, and how functions and classes are called with it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxscale import renamed
from jaxscale.signatures import (
    EMPTY,
    dataclasses_in,
    default_of,
    full_name,
    has_parameter,
    hints,
    is_made_of_parts,
    is_part_of,
    is_required,
    is_verb,
    parameters,
)
from jaxscale.types import InputError, check_type, one_of
from jaxscale.written import (
    REQUIRED,
    Fields,
    Macro,
    Reference,
    Scopes,
    UnwritableError,
    as_written,
    default_scopes,
    found,
    mapped,
    text_of,
)


@dataclasses.dataclass(frozen=True)
class Binding:
    """A value as written, with unresolved references, and where it was written."""

    value: Any
    location: str


Bound = dict[str, Binding]  # by parameter
Names = frozenset[str]
Values = dict[str, Any]  # by parameter


class Bindings:
    """All that gin files bind: macros, and parameters of functions and classes by scope."""

    def __init__(self):
        self.macros: dict[str, Binding] = {}
        self.parameters: dict[tuple[Scopes, Callable], Bound] = {}
        self._written: list[Any] = []  # every value, also those that a later one replaced

    def define(self, name: str, binding: Binding) -> None:
        """Gives a macro its value; the last one wins."""
        self.macros[name] = binding
        self._written.append(binding.value)

    def bind(self, scopes: Scopes, target: Callable, name: str, binding: Binding) -> None:
        """Binds one parameter; the last one wins.

        Raises:
            InputError: `target` has no parameter `name`.
        """
        check_parameter(target, name, binding.location)
        for kind in dataclasses_in(hints(target).get(name)):
            if self.of(kind, scopes):
                # This value may replace one built from the bindings of `kind`. That they were
                # written before it, often in an included file, is no mistake.
                self._written.append(Reference(kind, scopes, is_called=True))
        bound = self.parameters.setdefault((scopes, target), {})
        bound[name] = binding
        self._written.append(binding.value)

    def of(self, target: Callable, scopes: Scopes) -> Bound:
        """The bindings for `target` built in `scopes`; inner scopes override outer ones."""
        merged = {}
        for depth in range(len(scopes) + 1):
            outer = scopes[:depth]
            merged |= self.parameters.get((outer, target), {})
        return merged

    def implied(self, target: Callable, scopes: Scopes, name: str) -> Reference | None:
        """The configuration that a parameter to which nothing is bound is built from.

        Returns:
            `@Class()`, or None where the default stands or a value is missing.
        Raises:
            InputError: several classes that the annotation allows have bindings.
        """
        kinds = self._candidates(target, scopes, name)
        if not kinds:
            return None
        if len(kinds) == 1:
            return Reference(kinds[0], (), is_called=True)
        names = " and ".join(kind.__name__ for kind in kinds)
        field = f"{full_name(target)}.{name}"
        choices = [f"`{field} = @{full_name(kind)}()`" for kind in kinds]
        expected = f"{' or '.join(choices)}: one of them must be bound explicitly"
        raise InputError(f"{target.__name__}.{name}", f"bindings of {names}", expected)

    def _candidates(self, target: Callable, scopes: Scopes, name: str) -> list[type]:
        """The classes that `implied` may build: one is built, several are ambiguous."""
        kinds = dataclasses_in(hints(target).get(name))
        bound = [kind for kind in kinds if self.of(kind, scopes)]
        is_required_here = is_required(parameters(target)[name])
        if len(kinds) != 1:
            return bound if is_required_here else []
        if is_required_here:
            return kinds
        # Building a default that may hold the target again would never end.
        is_endless = is_part_of(target, kinds[0])
        return [] if is_endless else bound

    def expand(self, value: Any, label: str, seen: Names = frozenset()) -> Any:
        """A value as written with its macros replaced; an error for an unknown one has `label`."""
        if not isinstance(value, Macro):
            return mapped(lambda item: self.expand(item, label, seen), value)
        name = value.name
        if name == REQUIRED:
            raise InputError(label, f"%{REQUIRED}", "a value in a gin file or by --set")
        known = self.macros.keys() - seen
        if name not in known:
            raise InputError(f"{label}: %{name}", name, one_of(name, known))
        inner = self.macros[name].value
        return self.expand(inner, label, seen | {name})

    def check_used(self, function: Callable) -> None:
        """Raises InputError for what would silently do nothing, whichever verb gets the file.

        That is a macro that no value mentions, and a parameter of what nothing builds or refers to.
        """
        mentioned = {macro.name for macro in found(Macro, self._written)}
        for name, binding in self.macros.items():
            if name not in mentioned:
                known = one_of(name, mentioned - {REQUIRED})
                expected = f"a macro that a value mentions: {known}"
                raise InputError(f"{binding.location}: {name}", name, expected)
        uses = self._uses(function)
        targets = {use.target for use in uses}
        for (_, target), bound in self.parameters.items():
            if target not in targets:
                name, binding = next(iter(bound.items()))
                label = f"{binding.location}: {target.__name__}.{name}"
                place = _place_of(target, uses)
                reference = f"`{place}@{full_name(target)}()`"
                expected = f"also {reference}: nothing builds it, so this does nothing"
                raise InputError(label, text_of(binding.value), expected)

    def check_scopes(self) -> None:
        """Raises InputError for a binding in a scope that no reference enters: it does nothing."""
        values = [binding.value for binding in self.macros.values()]
        for bound in self.parameters.values():
            values += [binding.value for binding in bound.values()]
        entered = {""}
        for reference in found(Reference, values):
            for depth in range(len(reference.scopes)):
                outer = reference.scopes[: depth + 1]
                entered.add("/".join(outer))
        for (scopes, target), bound in self.parameters.items():
            name = "/".join(scopes)
            if name not in entered:
                binding = next(iter(bound.values()))
                label = f"{binding.location}: {name}/{target.__name__}"
                known = one_of(name, entered - {""})
                raise InputError(label, name, f"a scope that a reference enters: {known}")

    def _uses(self, function: Callable) -> list[Reference]:
        """Whatever may be used: `function`, the verbs, what values mention, and parts of these."""
        waiting = [Reference(function, (), is_called=True)]
        for scopes, target in self.parameters:
            # What a verb does not build, another verb that gets the same file may: a run's parts.
            if is_verb(target) or is_made_of_parts(target):
                waiting.append(Reference(target, scopes, is_called=True))
        waiting += found(Reference, self._written)
        uses = []
        while waiting:
            use = waiting.pop(0)
            if use not in uses:
                uses.append(use)
                waiting += self._parts(use)
        return uses

    def _parts(self, use: Reference) -> list[Reference]:
        """What the arguments of one use refer to or are built from."""
        target, scopes = use.target, use.scopes
        bound = self.of(target, scopes)
        values = [binding.value for binding in bound.values()]
        parts = [each.within(scopes) for each in self._mentions(values)]
        names = parameters(target) if use.is_called else ()
        for name in names:
            if name not in bound:
                for kind in self._candidates(target, scopes, name):
                    parts.append(Reference(kind, scopes, is_called=True))
        return parts

    def _mentions(self, value: Any, seen: Names = frozenset()) -> list[Reference]:
        """The references in a value as written and in the macros that it mentions."""
        references = found(Reference, value)
        for macro in found(Macro, value):
            if macro.name in self.macros.keys() - seen:
                inner = self.macros[macro.name].value
                references += self._mentions(inner, seen | {macro.name})
        return references


class Builder:
    """Builds arguments from bindings, and keeps what was used."""

    def __init__(self, bindings: Bindings):
        self.bindings = bindings
        self.used: Fields = {}
        self._unfinished: list[Reference] = []  # what is being built, outermost first

    def arguments(self, target: Callable, scopes: Scopes) -> dict[str, Any]:
        """The checked keyword arguments for `target` in `scopes`: bound or implied, no defaults."""
        arguments, written = self.bound(target, scopes)
        self.used[scopes, target] = written
        implied, missing = {}, []
        for name, parameter in parameters(target).items():
            if name in arguments:
                continue
            if reference := self.bindings.implied(target, scopes, name):
                implied[name] = reference
            elif is_required(parameter):
                missing.append(name)
            else:
                self._write_default(target, scopes, name)
        if missing:
            self._refuse(target, missing)
        written |= implied
        for name, reference in implied.items():
            arguments[name] = self._build(reference, scopes)
        return arguments

    def bound(self, target: Callable, scopes: Scopes) -> tuple[Values, Values]:
        """What is bound for `target` in `scopes`: built and checked, and as written."""
        annotations = hints(target)
        bindings = self.bindings.of(target, scopes)
        built, written = {}, {}
        for name, binding in bindings.items():
            label = f"{binding.location}: {target.__name__}.{name}"
            written[name] = self.bindings.expand(binding.value, label)
            built[name] = self._build(written[name], scopes)
            check_type(label, built[name], annotations.get(name, Any))
        return built, written

    def _build(self, written: Any, scopes: Scopes) -> Any:
        """A value as written, without macros, with its references built."""
        if not isinstance(written, Reference):
            return mapped(lambda item: self._build(item, scopes), written)
        reference = written.within(scopes)
        target, inner = reference.target, reference.scopes
        if reference.is_called:
            return self._called(reference)
        if not self.bindings.of(target, inner):
            return target
        arguments, self.used[inner, target] = self.bound(target, inner)
        return functools.partial(target, **arguments)

    def _called(self, reference: Reference) -> Any:
        target = reference.target
        if reference in self._unfinished:
            expected = "a reference that does not need itself to be built"
            raise InputError(target.__name__, text_of(reference), expected)
        self._unfinished.append(reference)
        built = target(**self.arguments(target, reference.scopes))
        self._unfinished.pop()
        return built

    def _refuse(self, target: Callable, missing: list[str]) -> None:
        names = ", ".join(missing)
        expected = f"a value for each of {names} in a gin file or by --set"
        targets = {target for _, target in self.bindings.parameters}
        verbs = sorted(full_name(each) for each in targets if is_verb(each))
        if is_verb(target) and verbs and target not in targets:
            listed = ", ".join(verbs)
            expected += f"; the only functions that the file binds are {listed}"
        raise InputError(f"{target.__name__}.{missing[0]}", None, expected)

    def _write_default(self, target: Callable, scopes: Scopes, name: str) -> None:
        """Adds a default to what was used, if a file can hold it and would give it again."""
        default = default_of(target, name)
        if default is EMPTY:
            return
        try:
            written, fields = as_written(default, default_scopes(scopes, target, name))
        except UnwritableError:
            return
        for reference in found(Reference, [written, fields]):
            bound = self.bindings.of(reference.target, scopes)
            if bound and not reference.is_called:
                return  # the file's reference would take the bindings of a function that has none
        self.used[scopes, target][name] = written
        self.used |= fields


def check_parameter(target: Callable, name: str, location: str) -> None:
    """Raises InputError, with the new name or the closest one, unless `target` has `name`."""
    if has_parameter(target, name):
        return
    expected = renamed.new_field(target, name)
    if not expected:
        expected = one_of(name, parameters(target))
    raise InputError(f"{location}: {target.__name__}.{name}", name, expected)


def _place_of(kind: Callable, uses: list[Reference]) -> str:
    """`c.Class.field = ` for a parameter in use that may be a `kind`; empty if there is none."""
    for use in uses:
        annotations = hints(use.target)
        for name, annotation in annotations.items():
            if kind in dataclasses_in(annotation):
                return f"{full_name(use.target)}.{name} = "
    return ""
