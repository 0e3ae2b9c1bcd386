"""Arrays seen with their dims in another order or divided; boxes of them are read as such."""

import dataclasses
import math

import numpy as np

from jaxscale.checkpoint.boxes import box_of
from jaxscale.checkpoint.source import LazyArray
from jaxscale.types import InputError


@dataclasses.dataclass(frozen=True)
class Permuted:
    """An array with its dims in another order; a `LazyArray`.

    Args:
        array: as it is stored.
        axes: for each dim, which of the array's it is.
    """

    array: LazyArray
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.array.shape[axis] for axis in self.axes)

    @property
    def dtype(self) -> np.dtype:
        """Its type."""
        return self.array.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads one box."""
        corner, sizes = box_of(index, self.shape)
        stored = [slice(None)] * len(self.axes)
        for axis, start, size in zip(self.axes, corner, sizes):
            stored[axis] = slice(start, start + size)
        return np.transpose(self.array[tuple(stored)], self.axes)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of an array's first dim; a `LazyArray`.

    Args:
        array: with those and others.
        first: the first of them.
        number: of them.
    """

    array: LazyArray
    first: int
    number: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return (self.number, *self.array.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Its type."""
        return self.array.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads one box."""
        corner, sizes = box_of(index, self.shape)
        start = self.first + corner[0]
        others = [slice(a, a + n) for a, n in zip(corner[1:], sizes[1:])]
        return self.array[slice(start, start + sizes[0]), *others]


@dataclasses.dataclass(frozen=True)
class Divided:
    """An array of which dims are divided, such as [D, N H] seen as [D, N, H]; a `LazyArray`.

    Args:
        array: as it is stored.
        shape: its sizes; each dim of the array is the product of one or more.
    Raises:
        InputError: the sizes do not make up the array's dims.
    """

    array: LazyArray
    shape: tuple[int, ...]

    def __post_init__(self):
        if tuple(map(math.prod, self._groups())) != tuple(self.array.shape):
            expected = (
                f"sizes whose products are the dims {tuple(self.array.shape)}, in their order"
            )
            raise InputError("shape", self.shape, expected)

    @property
    def dtype(self) -> np.dtype:
        """Its type."""
        return self.array.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads one box; of dims that are divided, whole rows of the first part."""
        corner, sizes = box_of(index, self.shape)
        stored, read_shape, kept = [], [], []
        dim = 0
        for group in self._groups():
            inner = math.prod(group[1:])
            stored.append(slice(corner[dim] * inner, (corner[dim] + sizes[dim]) * inner))
            read_shape += [sizes[dim], *group[1:]]
            kept.append(slice(None))
            for own in range(dim + 1, dim + len(group)):
                kept.append(slice(corner[own], corner[own] + sizes[own]))
            dim += len(group)
        read = np.asarray(self.array[tuple(stored)])
        return read.reshape(read_shape)[tuple(kept)]

    def _groups(self) -> list[tuple[int, ...]]:
        """The sizes that each dim of the array is divided into."""
        groups, rest = [], list(self.shape)
        for size in self.array.shape:
            group = [rest.pop(0)] if rest else [0]
            while rest and (math.prod(group) < size or rest[0] == 1):
                group.append(rest.pop(0))
            groups.append(tuple(group))
        if rest:
            groups.append(tuple(rest))
        return groups
