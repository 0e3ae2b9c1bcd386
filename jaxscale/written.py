"""Values as a gin file writes them: literals, references and macros, and a whole file as text."""

import ast
import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from jaxscale.signatures import full_name

Scopes = tuple[str, ...]
Place = tuple[Scopes, Callable]  # a function or class, in the scopes in which it is called
Fields = dict[Place, dict[str, Any]]  # values as written, by parameter

REQUIRED = "gin.REQUIRED"
LITERALS = (int, float, bool, str, bytes, type(None))


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/target` or, when it is called, `@scope/target()`."""

    target: Callable
    scopes: Scopes
    is_called: bool

    def within(self, scopes: Scopes) -> "Reference":
        """The reference where it is met in `scopes`: these are its own unless it has some."""
        if self.scopes:
            return self
        return dataclasses.replace(self, scopes=scopes)


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%name`."""

    name: str


class UnwritableError(Exception):
    """A value that no gin file can hold, such as a lambda."""


def default_scopes(scopes: Scopes, target: Callable, name: str) -> Scopes:
    """The scopes in which a parameter's default is written out.

    No other parameter has them, so an override of the default changes nothing else.
    """
    return (*scopes, target.__name__, name)


def as_written(value: Any, scopes: Scopes) -> tuple[Any, Fields]:
    """A Python value as a gin file would hold it.

    Args:
        value: a literal, a function or class that can be imported, such a function with parameters
            bound by name, a dataclass instance, or a list, tuple or dict of these.
        scopes: in which the fields of dataclass instances are bound.
    Returns:
        The value as written, and the bindings that it needs beside it.
    Raises:
        UnwritableError: the value is none of these.
    """
    if isinstance(value, Reference) or _is_literal(value):
        return value, {}
    if type(value) in (list, tuple):
        items, fields = _items_as_written(value, scopes)
        return type(value)(items), fields
    if type(value) is dict and all(map(_is_literal, value)):
        items, fields = _items_as_written(value.values(), scopes)
        return dict(zip(value, items)), fields
    if _is_importable(value):
        return Reference(value, (), is_called=False), {}
    if dataclasses.is_dataclass(type(value)):
        return _instance_as_written(value, scopes)
    if isinstance(value, functools.partial) and not value.args and _is_importable(value.func):
        return _partial_as_written(value, scopes)
    raise UnwritableError(repr(value))


def _items_as_written(values: Iterable[Any], scopes: Scopes) -> tuple[list[Any], Fields]:
    items, fields = [], {}
    *outer, name = scopes
    for index, value in enumerate(values):
        inner = (*outer, f"{name}_{index}")
        item, more = as_written(value, inner)
        items.append(item)
        fields |= more
    return items, fields


def _instance_as_written(instance: Any, scopes: Scopes) -> tuple[Reference, Fields]:
    kind = type(instance)
    values: dict[str, Any] = {}
    fields: Fields = {(scopes, kind): values}
    for field in dataclasses.fields(instance):
        name = field.name
        inner = (*scopes, name)
        values[name], more = as_written(getattr(instance, name), inner)
        fields |= more
    return Reference(kind, scopes, is_called=True), fields


def _partial_as_written(value: functools.partial, scopes: Scopes) -> tuple[Reference, Fields]:
    """A function of which gin has bound parameters, as it hands it to what calls it."""
    values: dict[str, Any] = {}
    fields: Fields = {(scopes, value.func): values}
    for name, given in value.keywords.items():
        values[name], more = as_written(given, (*scopes, name))
        fields |= more
    return Reference(value.func, scopes, is_called=False), fields


def _is_literal(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_literal, value))
    return type(value) in LITERALS


def _is_importable(value: Any) -> bool:
    """Whether a file that imports the module of a function or class finds it there by its name."""
    if not isinstance(value, (type, types.FunctionType)):
        return False
    each: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        each = getattr(each, name, None)
    return each is value


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies `function` to the items of a list, tuple or dict; anything else is returned."""
    if type(value) in (list, tuple):
        return type(value)(map(function, value))
    if type(value) is dict:
        return {function(key): function(item) for key, item in value.items()}
    return value


def found(kind: type, value: Any) -> list[Any]:
    """Every reference, or every macro, in a value as written."""
    if isinstance(value, kind):
        return [value]
    if isinstance(value, dict):
        return found(kind, list(value)) + found(kind, list(value.values()))
    if isinstance(value, (list, tuple)):
        return [each for item in value for each in found(kind, item)]
    return []


def literal_or_text(text: str) -> Any:
    """The Python literal that `text` is, or else `text` itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def text_of(value: Any) -> str:
    """The text by which a gin file gives a value as written."""
    if isinstance(value, Reference):
        name = "/".join([*value.scopes, full_name(value.target)])
        return f"@{name}()" if value.is_called else f"@{name}"
    if isinstance(value, Macro):
        return f"%{value.name}"
    if type(value) is list:
        return f"[{_joined(value)}]"
    if type(value) is tuple:
        comma = "," if len(value) == 1 else ""
        return f"({_joined(value)}{comma})"
    if type(value) is dict:
        pairs = [f"{text_of(key)}: {text_of(item)}" for key, item in value.items()]
        return "{" + ", ".join(pairs) + "}"
    if type(value) is float:
        # `inf` is a name and not a literal; 1e999 overflows to it.
        return repr(value).replace("inf", "1e999")
    return repr(value)


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(map(text_of, values))


def render(used: Fields) -> str:
    """The text of a gin file that binds `used`; macros are written out as their values."""
    targets = {target for _, target in used}
    targets |= {reference.target for reference in found(Reference, used)}
    modules = {target.__module__ for target in targets}
    lines = ["from __gin__ import dynamic_registration"]
    lines += [f"import {module}" for module in sorted(modules)]
    for scopes, target in sorted(used, key=_order):
        prefix = "/".join([*scopes, full_name(target)])
        values = used[scopes, target]
        lines.append("")
        for name in sorted(values):
            text = text_of(values[name])
            lines.append(f"{prefix}.{name} = {text}")
    return "\n".join(lines) + "\n"


def fields_of(text: str) -> dict[str, str]:
    """The fields that a text of `render` binds: `scope/Class.field` -> value as text."""
    found = {}
    for line in text.splitlines():
        name, is_binding, value = line.partition(" = ")
        *scopes, selector = name.split("/")
        owner_and_field = selector.split(".")[-2:]
        if is_binding:
            found["/".join([*scopes, ".".join(owner_and_field)])] = value
    return found


def _order(place: Place) -> tuple[str, Scopes]:
    scopes, target = place
    return full_name(target), scopes
