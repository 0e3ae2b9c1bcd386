"""Arrays that lie uncompressed in a file, read where they are indexed."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from jaxscale.types import InputError


def is_plain_name(name: str) -> bool:
    """Whether a name from a file can name an entry of a folder, and cannot lead out of it."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\0"}


@dataclasses.dataclass(frozen=True)
class FileArray:
    """An array in row-major order at a place in a file; a `LazyArray`.

    Args:
        path: of the file.
        offset: of its first byte.
        shape: its sizes.
        dtype: its type.
    Raises:
        InputError: the file ends before the array does.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __post_init__(self):
        end = self.offset + self.num_bytes
        size = self.path.stat().st_size
        if not 0 <= self.offset <= end <= size:
            raise InputError(str(self.path), f"{size} bytes", f"at least {end}: it is cut short")

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, first: int, shape: tuple[int, ...]) -> "FileArray":
        """The elements from `first` on of the flattened array, in a shape.

        Raises:
            InputError: the array has not so many.
        """
        end, size = first + math.prod(shape), math.prod(self.shape)
        if not 0 <= first <= end <= size:
            raise InputError(str(self.path), f"an array of {size} elements", f"at least {end}")
        offset = self.offset + first * self.dtype.itemsize
        return FileArray(self.path, offset, shape, self.dtype)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads one box; nothing stays mapped or in memory but the returned copy."""
        if not self.num_bytes:
            return np.empty(self.shape, self.dtype)[index]
        mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        return np.array(mapped[index])
