"""What can be bound: the parameters of functions and classes, their annotations and defaults."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from jaxscale.types import UNIONS

EMPTY = Parameter.empty
VARIADIC = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}
VERB_KINDS = {Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD}


def parameters(target: Callable) -> Mapping[str, Parameter]:
    """The parameters of a function, or the fields that a class takes."""
    return inspect.signature(target).parameters


def hints(target: Callable) -> dict[str, Any]:
    """The annotation of each parameter, with names that are written as strings resolved."""
    function = target.__init__ if inspect.isclass(target) else target
    found = typing.get_type_hints(function)
    found.pop("return", None)
    return found


def has_parameter(target: Callable, name: str) -> bool:
    """Whether `name` can be bound: any name can where the target has `**kwargs`."""
    known = parameters(target)
    kinds = {each.kind for each in known.values()}
    return name in known or Parameter.VAR_KEYWORD in kinds


def is_required(parameter: Parameter) -> bool:
    """Whether a call must give the parameter a value."""
    return parameter.default is EMPTY and parameter.kind not in VARIADIC


def default_of(target: Callable, name: str) -> Any:
    """The default of a parameter, made by its factory where a field has one; EMPTY for none."""
    if inspect.isclass(target) and dataclasses.is_dataclass(target):
        for field in dataclasses.fields(target):
            has_factory = field.default_factory is not dataclasses.MISSING
            if field.name == name and has_factory:
                return field.default_factory()
    return parameters(target)[name].default


def is_verb(target: Callable) -> bool:
    """Whether a target is taken for a verb: a function of keyword-only parameters."""
    if inspect.isclass(target):
        return False
    known = parameters(target)
    kinds = {each.kind for each in known.values()}
    return kinds <= VERB_KINDS


def dataclasses_in(annotation: Any) -> list[type]:
    """The dataclasses that a value may be an instance of: [A, B] for `A | B | None`."""
    members = (annotation,)
    if typing.get_origin(annotation) in UNIONS:
        members = typing.get_args(annotation)
    return [each for each in members if dataclasses.is_dataclass(each)]


def is_part_of(target: Callable, whole: type) -> bool:
    """Whether an instance of `whole` may be, or hold at any depth, an instance of `target`."""
    found, waiting = set(), [whole]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            for hint in hints(each).values():
                waiting += dataclasses_in(hint)
    return target in found


def full_name(target: Callable) -> str:
    """The full dotted name by which a gin file refers to a function or a class."""
    return f"{target.__module__}.{target.__qualname__}"


def is_made_of_parts(target: Callable) -> bool:
    """Whether a class must be given other configurations, as a run must."""
    if not dataclasses.is_dataclass(target):
        return False
    parameters = inspect.signature(target).parameters.values()
    required = [each.name for each in parameters if each.default is each.empty]
    return any(len(dataclasses_in(hints(target).get(name))) == 1 for name in required)
