"""The leaves of any source onto any mesh: each device gets the boxes that it holds.

There is no save and load between: a source may as well be arrays of another mesh in this process.
"""

import collections
import concurrent.futures
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale import tree
from jaxscale.checkpoint.boxes import box_of, boxes, pieces_of
from jaxscale.checkpoint.source import LazyArray
from jaxscale.types import InputError

# Pieces that are read while one is on its way to a device, and what there is at once: those, the
# one on its way, its copy in the wanted type and the transfer's.
NUM_AHEAD = 3
MAX_PIECES = NUM_AHEAD + 3
Box = tuple[slice, ...]


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
        InputError: a leaf is missing or of another shape; nothing has been read.
    """
    targets = {}
    for path, wanted in tree.flatten(abstract).items():
        if path not in leaves:
            raise InputError("checkpoint", path, "a leaf that it has")
        targets[path] = _Target(path, leaves[path], wanted)
    piece_bytes = max(1, budget_bytes // MAX_PIECES)
    for target, box, values in _read_ahead(targets.values(), piece_bytes):
        target.write(box, values)
    return tree.map_with_path(lambda path, _: targets[path].assembled(), abstract)


def _read_ahead(
    targets: Iterable["_Target"],
    piece_bytes: int,
) -> Iterator[tuple["_Target", Box, np.ndarray]]:
    """The pieces of all leaves in their order, each read once; the next are under way meanwhile."""
    waiting: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(NUM_AHEAD) as pool:
        try:
            for target in targets:
                for box in target.pieces(piece_bytes):
                    waiting.append((target, box, pool.submit(target.read, box)))
                    if len(waiting) > NUM_AHEAD:
                        yield _first(waiting)
            while waiting:
                yield _first(waiting)
        finally:
            for *_, reading in waiting:
                reading.cancel()


def _first(waiting: collections.deque) -> tuple["_Target", Box, np.ndarray]:
    target, box, reading = waiting.popleft()
    return target, box, reading.result()


class _Target:
    """An array that is being loaded: the shares that devices of this process hold of it."""

    def __init__(self, path: str, array: LazyArray, wanted: jax.ShapeDtypeStruct):
        self._array = array
        self._is_key = jax.dtypes.issubdtype(wanted.dtype, jax.dtypes.prng_key)
        if self._is_key:
            words = jax.eval_shape(jax.random.key_data, wanted)
            wanted = jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=wanted.sharding)
        if tuple(array.shape) != tuple(wanted.shape):
            raise InputError(path, tuple(array.shape), f"shape {tuple(wanted.shape)}")
        self._wanted = wanted
        self._shares: dict[Any, _Share] = {}
        self._places = []
        kind = wanted.sharding.memory_kind
        own = wanted.sharding.addressable_devices_indices_map(wanted.shape)
        for device, index in own.items():
            place = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
            corner, sizes = box_of(index, wanted.shape)
            key = (corner, sizes)
            if key not in self._shares:
                self._shares[key] = _Share(corner, sizes, place, wanted.dtype)
            self._places.append((key, place))

    def pieces(self, piece_bytes: int) -> Iterator[Box]:
        """Boxes that together are what the shares need, of at most so many bytes."""
        array, shares = self._array, list(self._shares.values())
        # Another process reads what only its devices hold.
        bounds = []
        for spans in zip(*(share.spans for share in shares)):
            bounds.append((min(a for a, _ in spans), max(b for _, b in spans)))
        for box in boxes(tuple(array.shape), pieces_of(array, piece_bytes)):
            clipped = _overlap(box, bounds)
            if any(_meets(clipped, share.spans) for share in shares):
                yield clipped

    def read(self, box: Box) -> np.ndarray:
        """The values of a box, in the type that is wanted."""
        return np.asarray(self._array[box]).astype(self._wanted.dtype, copy=False)

    def write(self, box: Box, values: np.ndarray) -> None:
        """Puts a piece where it belongs, and waits for that: no second one waits in memory."""
        meeting = [share for share in self._shares.values() if _meets(box, share.spans)]
        for share in meeting:
            own = _overlap(box, share.spans)
            within = [slice(a.start - b.start, a.stop - b.start) for a, b in zip(own, box)]
            share.write(values[tuple(within)], [part.start for part in own])
        jax.block_until_ready([share.values for share in meeting])

    def assembled(self) -> jax.Array:
        """The array, once all is written."""
        # Replicas are copied from the device that has read, not read again.
        parts = [jax.device_put(self._shares[key].whole(), place) for key, place in self._places]
        array = jax.make_array_from_single_device_arrays(
            self._wanted.shape,
            self._wanted.sharding,
            parts,
        )
        return jax.random.wrap_key_data(array) if self._is_key else array


class _Share:
    """The box of an array that a device holds, as it fills."""

    def __init__(
        self,
        corner: tuple[int, ...],
        sizes: tuple[int, ...],
        place: jax.sharding.SingleDeviceSharding,
        dtype: Any,
    ):
        self.spans = [(start, start + size) for start, size in zip(corner, sizes)]
        self.values: jax.Array | None = None
        self._sizes = sizes
        self._place = place
        self._dtype = dtype

    def write(self, piece: np.ndarray, first: list[int]) -> None:
        """Takes a piece of its own whose first element in the array is `first`."""
        # A copy: the source may go on to change what it has given.
        piece = jax.device_put(piece, self._place, may_alias=False)
        if piece.shape == self._sizes:
            self.values = piece
            return
        if self.values is None:
            self.values = self._zeros()
        offsets = tuple(at - start for at, (start, _) in zip(first, self.spans))
        self.values = _writer(self._place)(self.values, piece, offsets)

    def whole(self) -> jax.Array:
        """Its values; zeros where it has no element."""
        return self._zeros() if self.values is None else self.values

    def _zeros(self) -> jax.Array:
        zeros = functools.partial(jnp.zeros, self._sizes, self._dtype)
        return jax.jit(zeros, out_shardings=self._place)()


@functools.cache
def _writer(place: jax.sharding.SingleDeviceSharding) -> Any:
    """A program that writes a piece into a share where it lies."""
    return jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0, out_shardings=place)


def _overlap(box: Box, spans: Iterable[tuple[int, int]]) -> Box:
    return tuple(slice(max(part.start, a), min(part.stop, b)) for part, (a, b) in zip(box, spans))


def _meets(box: Box, spans: Iterable[tuple[int, int]]) -> bool:
    return all(part.start < part.stop for part in _overlap(box, spans))
