"""`describe`: every field of a part of a run, or every parameter of a verb."""

import textwrap
from collections.abc import Callable

from jaxscale import described, run
from jaxscale.types import InputError, one_of

WIDTH = 100


def describe(*, name: str) -> None:
    """Prints a class or function that `jaxscale.run` names: what it is, and its fields.

    Args:
        name: such as "OptimizerConfig".
    Raises:
        InputError: `jaxscale.run` has no such name.
    """
    if name not in run.__all__:
        raise InputError("name", name, one_of(name, run.__all__))
    target = getattr(run, name)
    print(f"{described.summary(target)}\n\n{fields_text(target)}")


def fields_text(target: Callable) -> str:
    """A paragraph for each field of a class or parameter of a function."""
    paragraphs = []
    for field in described.fields(target):
        head = f"  {field.name}: {field.type}, {_default_text(field.default)}"
        meaning = textwrap.fill(
            field.meaning, WIDTH, initial_indent="      ", subsequent_indent="      "
        )
        paragraphs.append(f"{head}\n{meaning}" if field.meaning else head)
    return "\n".join(paragraphs)


def _default_text(default: str) -> str:
    return default if default == "required" else f"default {default}"
