"""What is read from docstrings: every field and every parameter of a verb has a meaning."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Literal

import pytest

from jaxscale import cli, described, run

VERBS = {name: cli.load(verb.function) for name, verb in cli.VERBS.items()}
CLASSES = {name: getattr(run, name) for name in run.__all__}


@pytest.mark.parametrize("target", [*VERBS.values(), *CLASSES.values()], ids=[*VERBS, *CLASSES])
def test_everything_that_can_be_bound_is_described(target):
    assert described.summary(target)
    assert [field.name for field in described.fields(target) if not field.meaning] == []


@pytest.mark.parametrize("name", [name for name, each in CLASSES.items() if inspect.isclass(each)])
def test_public_methods_of_what_can_be_bound_say_what_they_do(name):
    public = [
        (method, member)
        for method, member in vars(CLASSES[name]).items()
        if inspect.isroutine(member) and (method == "__call__" or not method.startswith("_"))
    ]
    assert [method for method, member in public if not inspect.getdoc(member)] == []


@dataclasses.dataclass(frozen=True)
class Example:
    """First line.

    A second paragraph.

    Source: a paper: with colons.
    Args:
        size: number of things,
            of all kinds: large and small.
        low, high: bounds.
        make: a function.

    Attributes:
        area: no argument.
    """

    size: int
    low: int | None = None
    high: tuple[str, ...] = ("a",)
    make: Callable[[int], str] = str
    bare: Literal["a", 1] = 1


def test_a_docstring_is_taken_apart():
    assert described.summary(Example) == "First line.\n\nA second paragraph."
    fields = [dataclasses.astuple(field) for field in described.fields(Example)]
    assert fields == [
        ("size", "int", "required", "number of things, of all kinds: large and small."),
        ("low", "int | None", "None", "bounds."),
        ("high", "tuple[str, ...]", "('a',)", "bounds."),
        ("make", "Callable", "str", "a function."),
        ("bare", "'a' | 1", "1", ""),
    ]
