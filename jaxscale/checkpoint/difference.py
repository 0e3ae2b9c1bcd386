"""What two arrays of one name differ in, read piece by piece."""

import math

import numpy as np

from jaxscale.checkpoint.boxes import boxes, chunk_shape
from jaxscale.checkpoint.source import LazyArray

PIECE_BYTES = 1 << 26


def difference(one: LazyArray | None, two: LazyArray | None) -> str | None:
    """What two arrays of one name differ in; None where they are equal bit by bit."""
    if one is None or two is None:
        return "only in the second" if one is None else "only in the first"
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return f"{one.dtype}{list(one.shape)} and {two.dtype}{list(two.shape)}"
    largest, num_differing = 0.0, 0
    for box in boxes(one.shape, piece_of(one)):
        first, second = one[box], two[box]
        # As bits: zeros have two signs, and no number is equal to NaN.
        is_other = _bits(first) != _bits(second)
        if not is_other.any():
            continue
        num_differing += int(np.count_nonzero(is_other))
        first, second = first.ravel()[is_other], second.ravel()[is_other]
        with np.errstate(invalid="ignore"):  # infinity less itself
            errors = np.abs(first.astype(np.float64) - second.astype(np.float64))
        largest = np.maximum(largest, errors.max())  # NaN where one is NaN
    if not num_differing:
        return None
    total = math.prod(one.shape)
    return f"{num_differing} of {total} elements differ, by {largest:.3g} at most"


def _bits(array: np.ndarray) -> np.ndarray:
    """The bytes of each element as one value."""
    size = array.dtype.itemsize
    return np.ascontiguousarray(array).reshape(-1).view(np.dtype(f"V{size}"))


def piece_of(array: LazyArray) -> tuple[int, ...]:
    """The sizes of the boxes in which an array is compared or verified."""
    return chunk_shape(array.shape, array.dtype.itemsize, PIECE_BYTES)
