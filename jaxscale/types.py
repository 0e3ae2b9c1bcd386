"""Names shared by every package: array aliases, dimension legend, errors and the field type check.

Dimension legend, used in einsums, suffixes and the sharding rules:
    B batch, T query tokens, S key tokens, D model, N query heads, K kv heads, G queries per kv
    head, H head dim, F feed-forward, V vocabulary, E experts, A active experts per token,
    C capacity, L layers (of a stack: its periods), P pages, U learned positions, R rank of
    adapters, Y classes of a text, M rows of an alignment or of pairs, each attended by itself.
"""

import collections.abc
import dataclasses
import difflib
import enum
import functools
import inspect
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

import jax

Array = jax.Array
Params = dict[str, Any]
Batch = dict[str, Any]

MAX_NAMES = 20  # that an error lists
UNIONS = (typing.Union, types.UnionType)


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

    def __reduce__(self) -> tuple:
        # To other processes goes the message and not what was given, which may be of any type.
        return type(self).__new__, (type(self), str(self)), vars(self)


class RunError(RuntimeError):
    """A run that cannot go on or missed what was expected of it.

    The message says why and what is on disk.
    """


def check_types(instance: Any) -> None:
    """Checks each field of a dataclass instance against its annotation.

    Raises:
        InputError: a value is not of its field's type (an int is accepted for a float, nothing else
            is converted).
    """
    kind = type(instance)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(instance):
        parameter = f"{kind.__name__}.{field.name}"
        value = getattr(instance, field.name)
        check_type(parameter, value, hints[field.name])


def check_type(parameter: str, value: Any, annotation: Any) -> None:
    """Raises InputError unless `value` is of the type that `annotation` describes."""
    if _is_of_type(value, annotation):
        return
    expected = f"a value of type {_type_name(annotation)}"
    items = value if isinstance(value, tuple) else (value,)
    for item in items:
        if isinstance(item, type):
            expected += f"; in gin, brackets build one: @{item.__name__}()"
            break
    raise InputError(parameter, value, expected)


def check_built(parameter: str, value: Any) -> None:
    """Raises InputError for a class where an object was meant, as gin's brackets build one."""
    target = value.func if isinstance(value, functools.partial) else value
    if inspect.isclass(target):
        raise InputError(parameter, target, f"@{target.__name__}() with brackets, which builds one")


def check_choice(parameter: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises InputError unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise InputError(parameter, value, f"one of {listed}")


def check_positive(parameter: str, value: int | float) -> None:
    """Raises InputError unless `value` is finite and above zero."""
    if not 0 < value < math.inf:  # so that NaN fails too
        finite = "a finite number" if value == math.inf else "a number"
        raise InputError(parameter, value, f"{finite} above 0")


def check_not_negative(parameter: str, value: int | float) -> None:
    """Raises InputError unless `value` is zero or a finite number above."""
    if not 0 <= value < math.inf:  # so that NaN fails too
        raise InputError(parameter, value, "0 or a finite number above")


def one_of(given: str, known: Iterable[str]) -> str:
    """What to expect instead of a misspelt name: the known names, and the closest of them."""
    known = sorted(known)
    if not known:
        return "nothing: there is none"
    listed = ", ".join(known[:MAX_NAMES])
    if len(known) > MAX_NAMES:
        listed += ", ..."
    return f"one of {listed}{closest(given, known)}"


def closest(given: str, known: Iterable[str]) -> str:
    """`; closest is 'x'`, or nothing where no name is close."""
    found = difflib.get_close_matches(given, list(known), n=1)
    return f"; closest is {found[0]!r}" if found else ""


def _is_of_type(value: Any, annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if origin in UNIONS:
        return any(_is_of_type(value, arg) for arg in args)
    if origin is Literal:
        # 1 == True, so equal values may still be of two types.
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin in (tuple, list, dict):
        return isinstance(value, origin) and _are_items_of_type(value, origin, args)
    return _is_of_plain_type(value, annotation, origin)


def _are_items_of_type(value: Any, origin: type, args: tuple) -> bool:
    if origin is dict:
        pairs = tuple[args]
        return all(_is_of_type(pair, pairs) for pair in value.items())
    if origin is list or args[1:] == (Ellipsis,):
        return all(_is_of_type(item, args[0]) for item in value)
    if len(value) != len(args):
        return False
    return all(map(_is_of_type, value, args))


def _is_of_plain_type(value: Any, annotation: Any, origin: Any) -> bool:
    if annotation is Any:
        return True
    if collections.abc.Callable in (annotation, origin):
        return callable(value)
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is float:
        return isinstance(value, (int, float))
    if annotation in (None, type(None)):
        return value is None
    if isinstance(value, type):
        # A class has the methods of a protocol without being an instance of it.
        return type in (annotation, origin)
    return isinstance(value, origin or annotation)


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation)


class Role(enum.StrEnum):
    """What a parameter is; whoever treats parameters differently reads this and no name."""

    MATRIX = "matrix"  # of a dense matmul
    EXPERT = "expert"  # matrices of experts
    EMBEDDING = "embedding"  # looked up by token
    POSITIONS = "positions"  # looked up by position
    UNEMBEDDING = "unembedding"  # hidden state to logits
    VALUE = "value"  # hidden state to one value a token
    ROUTER = "router"  # hidden state to the logits of experts
    NORM = "norm"  # scales and biases of norms, and other scales that start at 1
    BIAS = "bias"  # of projections
    LOGIT_BIAS = "logit_bias"
