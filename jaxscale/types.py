"""Names shared by every package: array aliases, the dimension legend, the error for bad input and the field type check.

Dimension legend, used in einsums, suffixes and the sharding rules:
    B batch, T query tokens, S key tokens, D model, N query heads, K kv heads, G queries per kv
    head, H head dim, F feed-forward, V vocabulary, E experts, C capacity, L layers, P pages or
    learned positions.
"""

import collections.abc
import dataclasses
import enum
import math
import types
import typing
from typing import Any, Literal

import jax

Array = jax.Array
Params = dict[str, Any]
Batch = dict[str, Any]


class InputError(ValueError):
    """Input that a user can mend: names the parameter, what was given and what was expected.

    Args:
        parameter: dotted name of the parameter, such as `mesh.data`.
        given: the offending value.
        expected: what would have been right, with the equation where there is one.
    """

    def __init__(self, parameter: str, given: Any, expected: str):
        super().__init__(f"{parameter}: given {given!r}, expected {expected}")
        self.parameter = parameter


class RunError(RuntimeError):
    """A run that cannot go on or missed what was expected of it; the message says why and what is on disk."""


def check_types(instance: Any) -> None:
    """Checks each field of a dataclass instance against its annotation.

    Raises:
        InputError: a value is not of its field's type (an int is accepted for a float, nothing else
            is converted).
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        check_type(
            f"{type(instance).__name__}.{field.name}",
            getattr(instance, field.name),
            hints[field.name],
        )


def check_type(parameter: str, value: Any, annotation: Any) -> None:
    """Raises InputError unless `value` is of the type that `annotation` describes."""
    if not _is_of_type(value, annotation):
        items = value if isinstance(value, tuple) else (value,)
        classes = [item.__name__ for item in items if isinstance(item, type)]
        hint = f"; in gin, brackets build one: @{classes[0]}()" if classes else ""
        raise InputError(parameter, value, f"a value of type {_type_name(annotation)}{hint}")


def check_choice(parameter: str, value: Any, choices: collections.abc.Iterable[Any]) -> None:
    """Raises InputError unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise InputError(
            parameter, value, "one of " + ", ".join(repr(choice) for choice in choices)
        )


def check_positive(parameter: str, value: int | float) -> None:
    """Raises InputError unless `value` is above zero."""
    if not value > 0:  # so that NaN fails too
        raise InputError(parameter, value, "a number above 0")


def check_not_negative(parameter: str, value: int | float) -> None:
    """Raises InputError unless `value` is zero or a finite number above."""
    if not 0 <= value < math.inf:  # so that NaN fails too
        raise InputError(parameter, value, "0 or a finite number above")


def _is_of_type(value: Any, annotation: Any) -> bool:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_is_of_type(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and _are_items_of_type(value, args)
    if origin is list:
        return isinstance(value, list) and all(_is_of_type(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_of_type(key, args[0]) and _is_of_type(item, args[1]) for key, item in value.items()
        )
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return callable(value)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is None or annotation is type(None):
        return value is None
    if isinstance(value, type):  # it has the methods of a protocol without being one
        return type in (annotation, origin)
    return isinstance(value, origin or annotation)


def _are_items_of_type(value: tuple, args: tuple) -> bool:
    if len(args) == 2 and args[1] is Ellipsis:
        return all(_is_of_type(item, args[0]) for item in value)
    return len(value) == len(args) and all(map(_is_of_type, value, args))


def _type_name(annotation: Any) -> str:
    return (
        annotation.__name__
        if isinstance(annotation, type) and not typing.get_args(annotation)
        else str(annotation)
    )


class Role(enum.StrEnum):
    """What a parameter is; whoever treats parameters differently reads this and no name."""

    MATRIX = "matrix"  # of a dense matmul
    EXPERT = "expert"  # matrices of experts
    EMBEDDING = "embedding"  # looked up by token
    POSITIONS = "positions"  # looked up by position
    UNEMBEDDING = "unembedding"  # hidden state to logits
    ROUTER = "router"  # hidden state to the logits of experts
    NORM = "norm"  # scales and biases of norms, and other scales that start at 1
    BIAS = "bias"  # of projections
    LOGIT_BIAS = "logit_bias"
