"""What docstrings say of the parts of a run: each field's meaning beside its type and default."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

from jaxscale import signatures
from jaxscale.types import UNIONS

# "Args:" and "Args and Returns as `f`." begin a section, and "Source: a paper" is one of one line.
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Cost|Source)\b.*?:|Args .*\.")
# "steps: of the run" and "softcap, window: numbers" begin an argument.
ARGUMENT = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a class, or one parameter of a verb.

    Args:
        name: of the field.
        type: as it is annotated.
        default: as Python writes it; "required" for none.
        meaning: what the docstring says of it; empty where it says nothing.
    """

    name: str
    type: str
    default: str
    meaning: str


def summary(target: Callable) -> str:
    """The docstring before its first section, paragraphs kept."""
    lines = []
    for line in _docstring(target):
        if SECTION.match(line):
            break
        lines.append(line)
    return "\n".join(lines).strip()


def fields(target: Callable) -> list[Field]:
    """The fields of a class, or the parameters of a function, in their order."""
    meanings = _arguments(target)
    types = signatures.hints(target)
    found = []
    for name in signatures.parameters(target):
        default = signatures.default_of(target, name)
        found.append(
            Field(
                name=name,
                type=_type_name(types.get(name, Any)),
                default="required" if default is signatures.EMPTY else _value(default),
                meaning=meanings.get(name, ""),
            )
        )
    return found


def _docstring(target: Callable) -> list[str]:
    return (inspect.getdoc(target) or "").splitlines()


def _arguments(target: Callable) -> dict[str, str]:
    """The section "Args:" of a docstring: name -> text."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    is_inside = False
    for line in _docstring(target):
        if line and not line.startswith(" "):
            is_inside = line == "Args:"
            continue
        argument = ARGUMENT.fullmatch(line[4:])
        if is_inside and argument:
            names = argument[1].replace("*", "").split(", ")
            found |= {name: [argument[2]] for name in names}
        elif is_inside and line.startswith(" " * 8):
            for name in names:
                found[name].append(line.strip())
    return {name: " ".join(text) for name, text in found.items()}


def _type_name(annotation: Any) -> str:
    """An annotation without the modules of its names: "int | None", "tuple[str, ...]"."""
    if annotation is type(None):
        return "None"
    if annotation is ...:
        return "..."
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None:
        return getattr(annotation, "__name__", str(annotation))
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin in UNIONS:
        return " | ".join(map(_type_name, arguments))
    if isinstance(arguments[0], list):
        return origin.__name__
    return f"{origin.__name__}[{', '.join(map(_type_name, arguments))}]"


def _value(value: Any) -> str:
    """A default as a person writes it: a configuration by its class, a function by its name."""
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}()"
    if callable(value):
        return value.__name__
    return repr(value)
