"""What a checkpoint of any system offers a reader: arrays by path, of which parts can be read."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np


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
