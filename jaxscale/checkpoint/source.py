"""What a checkpoint of any system offers a reader: arrays by path, of which parts can be read."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from jaxscale.types import InputError


class LazyArray(Protocol):
    """An array on disk, read where it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Its type; bfloat16 and float8 are those of `ml_dtypes`."""
        ...

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads one box; `index` has a slice of step 1 for each dim, or fewer."""
        ...


class Source(Protocol):
    """A checkpoint as a flat mapping."""

    def leaves(self) -> Mapping[str, LazyArray]:
        """Each array by its path in the source's own names; nothing of them is read."""
        ...


@contextlib.contextmanager
def contents_named(place: Any) -> Iterator[None]:
    """Turns what goes wrong where contents are not as their system writes them into InputError.

    Args:
        place: the file or folder that has them.
    """
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        expected = f"the contents that its system writes ({error!r})"
        raise InputError("checkpoint", str(place), expected) from error
