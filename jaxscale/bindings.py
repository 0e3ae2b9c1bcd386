"""What a configuration binds: values for the parameters of functions and classes, by scope, and how they are built."""

import ast
import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from jaxscale.types import InputError, check_type

Scopes = tuple[str, ...]
REQUIRED = "gin.REQUIRED"
UNWRITABLE = object()


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/target` or, when it is called, `@scope/target()`."""

    target: Callable
    scopes: Scopes
    is_called: bool


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%name`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Binding:
    """A value as written, with unresolved references, and where it was written."""

    value: Any
    location: str


class Bindings:
    """Everything that a set of gin files binds: macros, and parameters of functions and classes by scope."""

    def __init__(self):
        self.macros: dict[str, Binding] = {}
        self.parameters: dict[tuple[Scopes, Callable], dict[str, Binding]] = {}
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
        known = inspect.signature(target).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        if name not in known and not takes_any:
            raise InputError(
                f"{binding.location}: {target.__name__}.{name}", name, one_of(name, known)
            )
        self.parameters.setdefault((scopes, target), {})[name] = binding
        self._written.append(binding.value)

    def of(self, target: Callable, scopes: Scopes) -> dict[str, Binding]:
        """The bindings for `target` built in `scopes`; those of inner scopes override those of outer ones."""
        merged = {}
        for depth in range(len(scopes) + 1):
            merged |= self.parameters.get((scopes[:depth], target), {})
        return merged

    def expand(self, value: Any, label: str, seen: frozenset[str] = frozenset()) -> Any:
        """A value as written with its macros replaced; `label` names it in the error for an unknown macro."""
        if isinstance(value, Macro):
            if value.name == REQUIRED:
                raise InputError(label, "%gin.REQUIRED", "a value in a gin file or by --set")
            if value.name not in self.macros or value.name in seen:
                raise InputError(
                    f"{label}: %{value.name}",
                    value.name,
                    one_of(value.name, self.macros.keys() - seen),
                )
            return self.expand(self.macros[value.name].value, label, seen | {value.name})
        return _mapped(lambda item: self.expand(item, label, seen), value)

    def check_used(self, function: Callable) -> None:
        """Raises InputError for what would silently do nothing, whichever verb the file is given to.

        That is a macro that no value mentions and a parameter of what no reference names; a
        function of keyword-only parameters is taken for a verb.
        """
        mentioned = {macro.name for macro in _found(Macro, self._written)}
        for name, binding in self.macros.items():
            if name not in mentioned:
                expected = f"a macro that a value mentions: {one_of(name, mentioned - {REQUIRED})}"
                raise InputError(f"{binding.location}: {name}", name, expected)
        targets = {function, *(reference.target for reference in _found(Reference, self._written))}
        for (_, target), bound in self.parameters.items():
            if target not in targets and not _is_verb(target):
                name, binding = next(iter(bound.items()))
                kinds = {each: _dataclass_in(hint) for each, hint in _hints(function).items()}
                places = [
                    f"{_selector(function)}.{each} = "
                    for each, kind in kinds.items()
                    if kind is target
                ]
                expected = f"also `{''.join(places[:1])}@{_selector(target)}()`: nothing builds it, so this does nothing"
                raise InputError(
                    f"{binding.location}: {target.__name__}.{name}",
                    _written(binding.value),
                    expected,
                )

    def check_scopes(self) -> None:
        """Raises InputError for a binding in a scope that no reference enters: it would silently do nothing."""
        written = [binding for bound in self.parameters.values() for binding in bound.values()]
        references = _found(
            Reference, [binding.value for binding in [*written, *self.macros.values()]]
        )
        entered = {
            reference.scopes[:depth]
            for reference in references
            for depth in range(len(reference.scopes) + 1)
        }
        for (scopes, target), bound in self.parameters.items():
            if scopes and scopes not in entered:
                location = next(iter(bound.values())).location
                name = "/".join(scopes)
                known = one_of(name, ["/".join(scopes) for scopes in entered if scopes])
                raise InputError(
                    f"{location}: {name}/{target.__name__}",
                    name,
                    f"a scope that a reference enters: {known}",
                )

    def override(self, function: Callable, text: str) -> None:
        """Binds what one `--set` argument says.

        Args:
            function: the verb; its parameters are the first names.
            text: `FIELD=VALUE` for a parameter of the function, `NAME.FIELD=VALUE` for a field of
                the configuration bound to its parameter NAME (and so on inwards),
                `SCOPE/NAME.FIELD=VALUE` to bind in that scope, `MACRO=VALUE` for a macro that the
                files define. VALUE is a Python literal, or else a plain string.
        """
        location = f"--set {text}"
        key, equals, value = text.partition("=")
        *scopes, dotted = key.strip().split("/")
        *parents, name = dotted.split(".")
        if not (equals and all(map(str.isidentifier, [*scopes, *parents, name]))):
            raise InputError("--set", text, "NAME.FIELD=VALUE or FIELD=VALUE")
        if value.lstrip().startswith(("@", "%")):
            raise InputError(
                f"--set {key}",
                value,
                "a Python literal or plain text; references belong in a gin file",
            )
        binding = Binding(_literal_or_text(value.strip()), location)
        if key.strip() in self.macros:
            self.define(key.strip(), binding)
            return
        target, scope = function, ()
        for parent in parents:
            target, scope = self._enter(target, scope, parent, location)
        self.bind(tuple(scopes) or scope, target, name, binding)

    def _enter(
        self, target: Callable, scopes: Scopes, name: str, location: str
    ) -> tuple[Callable, Scopes]:
        """What is built for parameter `name` of `target`, and its scopes; binds its default where nothing is bound."""
        signature = inspect.signature(target).parameters
        if name not in signature:
            raise InputError(f"{location}: {name}", name, one_of(name, signature))
        bound = self.of(target, scopes).get(name)
        value = (
            self.expand(bound.value, f"{bound.location}: {name}")
            if bound
            else signature[name].default
        )
        kind = _dataclass_in(_hints(target).get(name))
        if (
            kind is not None
            and not dataclasses.is_dataclass(value)
            and not isinstance(value, Reference)
        ):
            value = Reference(kind, default_scopes(scopes, target, name), is_called=True)
        reference, fields = as_written(value, default_scopes(scopes, target, name))
        if not (isinstance(reference, Reference) and reference.is_called):
            raise InputError(
                f"{location}: {name}", _written(value), "a configuration that has fields"
            )
        if not bound or bound.value != reference:
            self.bind(scopes, target, name, Binding(reference, location))
        for (inner, inner_target), values in fields.items():
            for field, each in values.items():
                self.bind(inner, inner_target, field, Binding(each, location))
        return reference.target, reference.scopes or scopes


class Builder:
    """Builds arguments from bindings, and keeps what was used."""

    def __init__(self, bindings: Bindings):
        self.bindings = bindings
        self.used: dict[tuple[Scopes, Callable], dict[str, Any]] = {}

    def arguments(self, target: Callable, scopes: Scopes) -> dict[str, Any]:
        """The checked keyword arguments for `target` in `scopes`; defaults are left out."""
        signature = inspect.signature(target).parameters
        arguments, self.used[scopes, target] = self.bound(target, scopes)
        missing = [
            each.name
            for each in signature.values()
            if _is_required(each) and each.name not in arguments
        ]
        if missing:
            expected = f"a value for each of {', '.join(missing)} in a gin file or by --set"
            bound = {_selector(each) for _, each in self.bindings.parameters if _is_verb(each)}
            if not scopes and bound and _selector(target) not in bound:
                expected += f"; the file binds only {', '.join(sorted(bound))}"
            raise InputError(f"{target.__name__}.{missing[0]}", None, expected)
        defaults = {
            each.name: each.default for each in signature.values() if each.name not in arguments
        }
        for name, value in defaults.items():
            written, fields = as_written(value, default_scopes(scopes, target, name))
            if written is not UNWRITABLE:
                self.used[scopes, target][name] = written
                self.used |= fields
        return arguments

    def bound(self, target: Callable, scopes: Scopes) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is bound for `target` in `scopes`: built and checked, and as written."""
        hints = _hints(target)
        built, written = {}, {}
        for name, binding in self.bindings.of(target, scopes).items():
            label = f"{binding.location}: {target.__name__}.{name}"
            written[name] = self.bindings.expand(binding.value, label)
            built[name] = self._build(written[name], scopes)
            check_type(label, built[name], hints.get(name, Any))
        return built, written

    def _build(self, written: Any, scopes: Scopes) -> Any:
        """A value as written, without macros, with its references built."""
        if not isinstance(written, Reference):
            return _mapped(lambda item: self._build(item, scopes), written)
        target, inner = written.target, written.scopes or scopes
        if written.is_called:
            return target(**self.arguments(target, inner))
        if not self.bindings.of(target, inner):
            return target
        arguments, self.used[inner, target] = self.bound(target, inner)
        return functools.partial(target, **arguments)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies `function` to the items of a list, tuple or dict as gin writes them; anything else is returned."""
    if type(value) in (list, tuple):
        return type(value)(map(function, value))
    if type(value) is dict:
        return {function(key): function(item) for key, item in value.items()}
    return value


def _hints(target: Callable) -> dict[str, Any]:
    return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def _is_verb(target: Callable) -> bool:
    kinds = {parameter.kind for parameter in inspect.signature(target).parameters.values()}
    return not inspect.isclass(target) and kinds <= {
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    }


def default_scopes(scopes: Scopes, target: Callable, name: str) -> Scopes:
    """The scopes in which the default of one parameter is written out, so that it is nobody else's."""
    return (*scopes, target.__name__, name)


def as_written(
    value: Any, scopes: Scopes
) -> tuple[Any, dict[tuple[Scopes, Callable], dict[str, Any]]]:
    """A value as a gin file would hold it, and the bindings in `scopes` that this takes; UNWRITABLE if none would."""
    if isinstance(value, Reference) or _is_literal(value):
        return value, {}
    if inspect.isfunction(value) and "<" not in value.__qualname__:
        return Reference(value, (), is_called=False), {}
    if not dataclasses.is_dataclass(value) or inspect.isclass(value):
        return UNWRITABLE, {}
    written, bindings = {}, {}
    for field in dataclasses.fields(value):
        written[field.name], more = as_written(getattr(value, field.name), (*scopes, field.name))
        bindings |= more
    if UNWRITABLE in written.values():
        return UNWRITABLE, {}
    return Reference(type(value), scopes, is_called=True), {
        (scopes, type(value)): written
    } | bindings


def _is_literal(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_literal, value))
    if type(value) is dict:
        return all(map(_is_literal, value.keys())) and all(map(_is_literal, value.values()))
    return type(value) in (int, float, bool, str, bytes, type(None))


def render(used: dict[tuple[Scopes, Callable], dict[str, Any]]) -> str:
    """The text of a gin file that binds `used`; macros are written out as their values."""
    modules = {
        each.__module__
        for each in [*(target for _, target in used), *(r.target for r in _found(Reference, used))]
    }
    lines = [
        "from __gin__ import dynamic_registration",
        *(f"import {module}" for module in sorted(modules)),
    ]
    for (scopes, target), values in sorted(
        used.items(), key=lambda item: (_selector(item[0][1]), item[0][0])
    ):
        prefix = "/".join([*scopes, _selector(target)])
        lines += [
            "",
            *(f"{prefix}.{name} = {_written(value)}" for name, value in sorted(values.items())),
        ]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    if isinstance(value, Reference):
        return "@" + "/".join([*value.scopes, _selector(value.target)]) + "()" * value.is_called
    if isinstance(value, Macro):
        return f"%{value.name}"
    if type(value) in (list, tuple):
        items = ", ".join(map(_written, value)) + "," * (type(value) is tuple and len(value) == 1)
        return f"[{items}]" if type(value) is list else f"({items})"
    if type(value) is dict:
        return (
            "{"
            + ", ".join(f"{_written(key)}: {_written(item)}" for key, item in value.items())
            + "}"
        )
    return repr(value).replace("inf", "1e999") if type(value) is float else repr(value)


def _selector(target: Callable) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _found(kind: type, value: Any) -> list[Any]:
    """Every reference, or every macro, in a value as written."""
    if isinstance(value, kind):
        return [value]
    if isinstance(value, dict):
        return _found(kind, [*value.keys(), *value.values()])
    if isinstance(value, (list, tuple)):
        return [each for item in value for each in _found(kind, item)]
    return []


def _literal_or_text(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _dataclass_in(annotation: Any) -> type | None:
    """The one configuration class that an annotation such as `MoeConfig | None` allows."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    found = [each for each in members if dataclasses.is_dataclass(each)]
    return found[0] if len(found) == 1 else None


def one_of(given: str, known: Iterable[str]) -> str:
    """What was expected instead of a misspelt name: the closest one, and all of them where they are few."""
    known = sorted(known)
    some = ", ".join(known[:20]) + ", ..." * (len(known) > 20)
    return (f"one of {some}" if known else "nothing: there is none") + closest(given, known)


def closest(given: str, known: Iterable[str]) -> str:
    """`; closest is 'x'`, or nothing where none is close."""
    found = difflib.get_close_matches(given, list(known), n=1)
    return f"; closest is {found[0]!r}" if found else ""
