"""Libraries of extras, which are imported when they are needed."""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

from jaxscale.types import InputError


def imported(module: str, needed_by: str, extra: str = "data") -> ModuleType:
    """A module of such a library.

    Args:
        module: its name.
        needed_by: what the error names.
        extra: which of the package's extras has it.
    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        expected = f"the extra: pip install 'jaxscale[{extra}]'"
        raise InputError(needed_by, f"no {module}", expected) from error


@contextlib.contextmanager
def library_errors(parameter: str, given: str, expected: str) -> Iterator[None]:
    """Turns what a library raises while it reads a damaged file into InputError.

    That may be anything: its own errors, OSError without a number, KeyError, UnicodeDecodeError.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = error.__cause__ or error  # datasets says why in the cause alone
        raise InputError(
            parameter, given, f"{expected} ({type(reason).__name__}: {reason})"
        ) from error
