"""Boxes: where the parts of an array lie in the whole, and the whole read from its parts.

The one primitive of every conversion. A named pattern, the ranges of a flat ZeRO partition and a
jax.sharding all become placements; what is then done with them does not depend on where they came
from.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Literal

import numpy as np

from jaxscale.checkpoint.source import LazyArray
from jaxscale.types import InputError, RunError

Copies = Literal["equal", "mean"]
Interval = tuple[int, int]
Box = tuple[slice, ...]  # a slice with start and stop for each dim


@dataclasses.dataclass(frozen=True)
class Placement:
    """A box of a part and where its elements lie in the whole.

    Element i along dim d of the box is element `starts[d] + i * steps[d]` of the whole. A whole may
    have more dims than the part; in those before the part's the box has size 1.

    Args:
        part: the array that holds the box.
        reads: first element of the box in `part`, one a dim of the part.
        starts: its place in the whole, one a dim of the whole.
        sizes: of the box, one a dim of the whole.
        steps: between its elements in the whole.
        origin: the part's name and ranks, for messages.
    """

    part: LazyArray
    reads: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    origin: str

    @property
    def stops(self) -> tuple[int, ...]:
        """One past its last element in the whole, by dim."""
        stops = []
        for start, size, step in zip(self.starts, self.sizes, self.steps):
            stops.append(start + (size - 1) * step + 1)
        return tuple(stops)

    def copy_to(self, out: np.ndarray, corner: Sequence[int]) -> int:
        """Copies what lies in a box of the whole; returns the number of elements copied.

        Args:
            out: the box, a contiguous part of the whole.
            corner: its first element in the whole.
        """
        reads, writes, num_copied = [], [], 1
        for dim, size in enumerate(out.shape):
            first, count = self._overlap(dim, corner[dim], size)
            if count <= 0:
                return 0
            begin = self.starts[dim] + first * self.steps[dim] - corner[dim]
            end = begin + (count - 1) * self.steps[dim] + 1
            writes.append(slice(begin, end, self.steps[dim]))
            reads.append(slice(first, first + count))
            num_copied *= count
        num_stacked = len(reads) - len(self.reads)
        own = []
        for read, start in zip(reads[num_stacked:], self.reads):
            own.append(slice(start + read.start, start + read.stop))
        out[tuple(writes)] = self.part[tuple(own)]
        return num_copied

    def _overlap(self, dim: int, corner: int, size: int) -> tuple[int, int]:
        """Along one dim: the first element within [corner, corner + size), and how many are."""
        start, step = self.starts[dim], self.steps[dim]
        first = max(0, -(-(corner - start) // step))
        last = min(self.sizes[dim] - 1, (corner + size - 1 - start) // step)
        return first, last - first + 1


@dataclasses.dataclass(frozen=True)
class Merged:
    """An array read from the parts that ranks hold; a `LazyArray`.

    Args:
        name: of the array, for messages.
        shape: of the whole.
        dtype: of the whole and of every part.
        copies: sets of placements, of which each covers the whole exactly once.
        combine: "equal" reads all copies and refuses a difference; "mean" averages them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    copies: tuple[tuple[Placement, ...], ...]
    combine: Copies = "equal"

    def __post_init__(self):
        for placements in self.copies:
            for placement in placements:
                if placement.part.dtype != self.dtype:
                    expected = f"{self.dtype}, as {placements[0].origin} has"
                    raise InputError(
                        placement.origin, str(placement.part.dtype), f"{expected} of {self.name}"
                    )
            fault = find_fault(self.shape, placements)
            if fault is not None:
                given = f"shape {self.shape}"
                raise InputError(self.name, given, f"each element written exactly once; {fault}")

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads one box; `index` has a slice of step 1 for each dim, or fewer."""
        corner, sizes = box_of(index, self.shape)
        first, *others = self.copies
        value = self._read(first, corner, sizes)
        if self.combine == "mean":
            total = value.astype(np.float64)
            for placements in others:
                total += self._read(placements, corner, sizes)
            return (total / len(self.copies)).astype(self.dtype)
        # One copy after the other, so that never more than two are in memory.
        for placements in others:
            if self._read(placements, corner, sizes).tobytes() != value.tobytes():
                origins = f"{first[0].origin} and {placements[0].origin}"
                raise InputError(self.name, f"different values in {origins}", "equal copies")
        return value

    def _read(
        self,
        placements: tuple[Placement, ...],
        corner: tuple[int, ...],
        sizes: tuple[int, ...],
    ) -> np.ndarray:
        out = np.empty(sizes, self.dtype)
        num_copied = sum(placement.copy_to(out, corner) for placement in placements)
        if num_copied != out.size:
            raise RunError(f"{self.name}: {num_copied} of {out.size} elements were written")
        return out


def box_of(
    index: slice | tuple[slice, ...],
    shape: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First element and sizes of the box that slices select; dims without a slice are whole."""
    slices = index if isinstance(index, tuple) else (index,)
    slices += (slice(None),) * (len(shape) - len(slices))
    ranges = [range(*each.indices(size)) for each, size in zip(slices, shape)]
    return tuple(each.start for each in ranges), tuple(len(each) for each in ranges)


def chunk_shape(shape: tuple[int, ...], itemsize: int, limit: int) -> tuple[int, ...]:
    """The sizes of the largest boxes of whole trailing dims that are at most `limit` bytes.

    One element is never divided.
    """
    chunk = list(shape)
    for dim in range(len(shape)):
        row = math.prod(shape[dim + 1 :]) * itemsize
        chunk[dim] = max(1, min(shape[dim], limit // max(row, 1)))
        if row <= limit:
            break
    return tuple(max(size, 1) for size in chunk)


def piece_sizes(array: LazyArray, limit: int) -> tuple[int, ...]:
    """The sizes of the boxes of at most `limit` bytes in which an array is read.

    They are made of whole chunks where the array is stored in chunks that fit, so that none is read
    twice.
    """
    shape, itemsize = tuple(array.shape), array.dtype.itemsize
    chunk = getattr(array, "chunk", None)
    if chunk is None or math.prod(chunk) * itemsize > limit:
        return chunk_shape(shape, itemsize, limit)
    sizes = list(chunk)
    for dim in reversed(range(len(shape))):
        layer = math.prod(sizes) // sizes[dim] * itemsize
        sizes[dim] = max(1, min(shape[dim], limit // layer // chunk[dim] * chunk[dim]))
        if sizes[dim] < shape[dim]:
            break
    return tuple(sizes)


def boxes(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The boxes of at most the sizes `chunk` that make up an array."""
    ranges = []
    for size, step in zip(shape, chunk):
        ranges.append([slice(at, min(at + step, size)) for at in range(0, size, step)])
    return itertools.product(*ranges)


def overlap(box: Box, other: Box) -> Box:
    """What two boxes share; see `is_empty`."""
    shared = []
    for one, two in zip(box, other):
        shared.append(slice(max(one.start, two.start), min(one.stop, two.stop)))
    return tuple(shared)


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of them."""
    spans = []
    for parts in zip(*boxes):
        first = min(part.start for part in parts)
        last = max(part.stop for part in parts)
        spans.append(slice(first, last))
    return tuple(spans)


def relative(box: Box, within: Box) -> Box:
    """A box as it lies in one that holds it."""
    moved = []
    for part, outer in zip(box, within):
        moved.append(slice(part.start - outer.start, part.stop - outer.start))
    return tuple(moved)


def is_empty(box: Box) -> bool:
    """Whether a box has no element."""
    return any(part.start >= part.stop for part in box)


def write_rows(file: BinaryIO, array: LazyArray, piece_bytes: int) -> None:
    """Writes an array in row-major order, at most `piece_bytes` of it in memory at once."""
    chunk = chunk_shape(array.shape, array.dtype.itemsize, piece_bytes)
    for box in boxes(array.shape, chunk):
        # Boxes of whole trailing dims are contiguous.
        file.write(np.ascontiguousarray(array[box]).tobytes())


def find_fault(shape: tuple[int, ...], placements: Sequence[Placement]) -> str | None:
    """What is wrong unless the placements cover each element of the whole exactly once.

    Args:
        shape: of the whole.
        placements: any number of them.
    Returns:
        None, or a sentence that names the element and the origins.
    """
    for placement in placements:
        for dim, (stop, size) in enumerate(zip(placement.stops, shape)):
            if stop > size:
                return f"{placement.origin} reaches to {stop} in dim {dim}, which has {size}"
            if placement.starts[dim] < 0:
                return f"{placement.origin} begins at {placement.starts[dim]} in dim {dim}"
    if math.prod(shape) == 0:
        return None
    return _find_fault(shape, placements, ())


def _find_fault(
    shape: tuple[int, ...],
    placements: Sequence[Placement],
    corner: tuple[int, ...],
) -> str | None:
    """As `find_fault`, of the elements that begin with `corner`, dim by dim."""
    dim = len(corner)
    if not placements:
        return f"nothing writes {list(corner)}"
    if dim == len(shape):
        if len(placements) > 1:
            origins = " and ".join(placement.origin for placement in placements[:2])
            return f"{origins} both write {list(corner)}"
        return None
    for start, members in _stretches(placements, dim, shape[dim]):
        fault = _find_fault(shape, members, (*corner, start))
        if fault is not None:
            return fault
    return None


def _stretches(
    placements: Sequence[Placement],
    dim: int,
    size: int,
) -> Iterator[tuple[int, list[Placement]]]:
    """Stretches of a dim along which the same placements lie: (first element, those)."""
    changes: dict[int, list[tuple[int, bool]]] = {0: []}
    for number, placement in enumerate(placements):
        for start, stop in _intervals(placement, dim):
            changes.setdefault(start, []).append((number, True))
            changes.setdefault(stop, []).append((number, False))
    active: set[int] = set()
    for position in sorted(changes):
        if position >= size:
            return
        active -= {number for number, is_start in changes[position] if not is_start}
        active |= {number for number, is_start in changes[position] if is_start}
        yield position, [placements[number] for number in sorted(active)]


def _intervals(placement: Placement, dim: int) -> list[Interval]:
    start, size, step = placement.starts[dim], placement.sizes[dim], placement.steps[dim]
    if step == 1:
        return [(start, start + size)] if size else []
    firsts = range(start, start + size * step, step)
    return [(first, first + 1) for first in firsts]


def flat_boxes(
    shape: tuple[int, ...], start: int, stop: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes, (first element, sizes), that elements [start, stop) of a flattened array fill.

    They come in the order of their elements, of which each box holds a contiguous range. An array
    of n dims needs at most 2 n - 1 boxes.
    """
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        # The range lies within one row.
        return _within_row(shape, start, stop)
    boxes = _within_row(shape, start, first * row)
    if last > first:
        corner = (first, *(0 for _ in shape[1:]))
        boxes.append((corner, (last - first, *shape[1:])))
    return boxes + _within_row(shape, last * row, stop)


def _within_row(
    shape: tuple[int, ...],
    start: int,
    stop: int,
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    row = math.prod(shape[1:])
    number = start // row
    inner = flat_boxes(shape[1:], start - number * row, stop - number * row)
    return [((number, *corner), (1, *sizes)) for corner, sizes in inner]
