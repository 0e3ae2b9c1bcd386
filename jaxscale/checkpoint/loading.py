"""The leaves of any source onto any mesh: each device reads the boxes that it holds.

There is no save and load between: a source may as well be arrays of another mesh in this process.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale import tree
from jaxscale.checkpoint.boxes import box_of, boxes, chunk_shape
from jaxscale.checkpoint.source import LazyArray
from jaxscale.types import InputError

# Of a piece there are at once what is read, its copy in the wanted type, and the transfer's.
MAX_COPIES = 4
Box = tuple[tuple[int, ...], tuple[int, ...]]  # first element and sizes


def load(leaves: Mapping[str, LazyArray], abstract: Any, *, budget_bytes: int) -> Any:
    """Arrays placed as asked, and cast where another type is asked.

    Args:
        leaves: of the source, by path.
        abstract: tree of jax.ShapeDtypeStruct with shardings, on any mesh; what it has no leaf for
            is not read.
        budget_bytes: of host memory beyond the arrays themselves, also where a device's share of a
            leaf is larger.
    Returns:
        The tree with jax arrays.
    Raises:
        InputError: a leaf is missing or of another shape.
    """
    piece_bytes = max(1, budget_bytes // MAX_COPIES)

    def one(path: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if path not in leaves:
            raise InputError("checkpoint", path, "a leaf that it has")
        if not jax.dtypes.issubdtype(wanted.dtype, jax.dtypes.prng_key):
            return _placed(path, leaves[path], wanted, piece_bytes)
        words = jax.eval_shape(jax.random.key_data, wanted)
        words = jax.ShapeDtypeStruct(
            words.shape,
            words.dtype,
            sharding=wanted.sharding,
        )
        key = _placed(path, leaves[path], words, piece_bytes)
        return jax.random.wrap_key_data(key)

    return tree.map_with_path(one, abstract)


def _placed(
    path: str,
    array: LazyArray,
    wanted: jax.ShapeDtypeStruct,
    piece_bytes: int,
) -> jax.Array:
    if tuple(array.shape) != tuple(wanted.shape):
        raise InputError(path, tuple(array.shape), f"shape {tuple(wanted.shape)}")
    own = wanted.sharding.addressable_devices_indices_map(wanted.shape)
    kind = wanted.sharding.memory_kind
    shares: dict[Box, _Share] = {}
    places = []
    for device, index in own.items():
        target = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        box = box_of(index, wanted.shape)
        shares.setdefault(box, _Share(box, target, wanted.dtype))
        places.append((box, target))
    _fill(array, list(shares.values()), piece_bytes)
    # Replicas are copied from the device that has read, not read again.
    return jax.make_array_from_single_device_arrays(
        wanted.shape,
        wanted.sharding,
        [jax.device_put(shares[box].values, target) for box, target in places],
    )


class _Share:
    """The box of an array that a device holds, as it fills."""

    def __init__(self, box: Box, target: jax.sharding.Sharding, dtype: Any):
        self._corner, self._sizes = box
        self._target = target
        self._dtype = dtype
        self.values: jax.Array | None = None
        if 0 in self._sizes:
            self.values = jax.device_put(np.empty(self._sizes, dtype), target)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Its first and one past its last element, by dim."""
        return [(a, a + n) for a, n in zip(self._corner, self._sizes)]

    def write(self, piece: np.ndarray, first: list[int]) -> None:
        """Takes what is its own of a piece whose first element is `first` and which it meets."""
        own = piece.astype(self._dtype)
        if own.shape == self._sizes:
            self.values = jax.device_put(own, self._target)
            return
        if self.values is None:
            zeros = functools.partial(jnp.zeros, self._sizes, self._dtype)
            self.values = jax.jit(zeros, out_shardings=self._target)()
        offsets = tuple(at - start for at, start in zip(first, self._corner))
        self.values = _write(self.values, jax.device_put(own, self._target), offsets)


def _fill(array: LazyArray, shares: list[_Share], piece_bytes: int) -> None:
    """Reads an array once, in pieces, whatever boxes the devices hold."""
    shape = tuple(array.shape)
    chunk = chunk_shape(shape, array.dtype.itemsize, piece_bytes)
    for box in boxes(shape, chunk):
        meeting = []
        for share in shares:
            bounds = zip(box, share.bounds)
            overlap = [(max(part.start, a), min(part.stop, b)) for part, (a, b) in bounds]
            if all(a < b for a, b in overlap):
                meeting.append((share, overlap))
        if not meeting:
            continue  # another process holds it
        values = np.asarray(array[box])
        for share, overlap in meeting:
            own = [slice(a - part.start, b - part.start) for part, (a, b) in zip(box, overlap)]
            share.write(values[tuple(own)], [a for a, _ in overlap])
        # So that no second piece waits in host memory.
        jax.block_until_ready([share.values for share, _ in meeting])


@functools.partial(jax.jit, donate_argnums=0)
def _write(share: jax.Array, piece: jax.Array, offsets: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(share, piece, offsets)
