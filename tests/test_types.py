"""The type check that stands between gin, which accepts anything, and the code."""

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import pytest

from jaxscale.types import InputError, check_choice, check_positive, check_type, check_types


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    rate: float = 0.1

    def __post_init__(self):
        check_types(self)


@runtime_checkable
class Sized(Protocol):
    def __len__(self) -> int: ...


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int, [3], [True, 3.0, "3", None]),
        (float, [3, 0.5], [True, "0.5"]),
        (bool, [True], [1, "True"]),
        (str, ["a"], [1, b"a"]),
        (int | None, [3, None], ["3"]),
        (Literal["adamw", "lion"], ["lion"], ["sgd", None]),
        (Literal[0, 1], [1], [True, 2, 1.0]),
        (tuple[int, ...], [(), (1, 2)], [[1], (1, "2"), 1]),
        (tuple[int, str], [(1, "a")], [(1,), ("a", 1)]),
        (list[int], [[], [1]], [(1,), ["a"]]),
        (dict[str, float], [{}, {"a": 1}], [{1: 1.0}, {"a": "b"}, []]),
        (dict, [{}], [[]]),
        (Callable[[int], int], [abs], [3]),
        (Callable | None, [abs, None], [3]),
        (Inner, [Inner()], [{"size": 1}, Inner]),
        (Sized, [""], [3, str]),
        (type, [Inner], [Inner()]),
        (Any, [3, None, "a"], []),
    ],
)
def test_check_type(annotation, good, bad):
    for value in good:
        check_type("x", value, annotation)
    for value in bad:
        with pytest.raises(InputError):
            check_type("x", value, annotation)


def test_fields_are_checked_and_named():
    assert Outer(inner=Inner(), rate=1).rate == 1
    with pytest.raises(
        InputError, match=r"^Outer\.rate: given 'fast', expected a value of type float$"
    ) as caught:
        Outer(inner=Inner(), rate="fast")
    assert caught.value.parameter == "Outer.rate"
    with pytest.raises(InputError, match=r"Outer\.inner: given 3, expected a value of type Inner"):
        Outer(inner=3)


def test_a_class_in_the_place_of_an_instance_is_told_from_it():
    with pytest.raises(
        InputError, match=r"x: given .*Inner.*; in gin, brackets build one: @Inner\(\)"
    ):
        check_type("x", (Inner,), tuple[Inner, ...])


def test_choices_and_bounds_are_printed():
    check_choice("mode", "a", ["a", "b"])
    with pytest.raises(InputError, match="mode: given 'c', expected one of 'a', 'b'"):
        check_choice("mode", "c", ["a", "b"])
    check_positive("steps", 1)
    with pytest.raises(InputError, match="rate: given nan, expected a number above 0"):
        check_positive("rate", float("nan"))
    with pytest.raises(InputError, match="steps: given 0, expected a number above 0"):
        check_positive("steps", 0)


def test_an_error_reaches_the_process_that_waits_for_a_worker():
    there = pickle.loads(pickle.dumps(InputError("steps", lambda: 0, "a number")))
    assert isinstance(there, InputError) and there.parameter == "steps"
    assert "expected a number" in str(there)
