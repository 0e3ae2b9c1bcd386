"""The leaves of any source onto any mesh: each device gets the boxes that it holds.

There is no save and load between: a source may as well be arrays of another mesh in this process.
"""

import collections
import concurrent.futures
import functools
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxscale import tree
from jaxscale.checkpoint.boxes import (
    Box,
    box_of,
    boxes,
    hull,
    is_empty,
    overlap,
    piece_sizes,
    relative,
)
from jaxscale.checkpoint.native import key_implementation
from jaxscale.checkpoint.source import LazyArray
from jaxscale.types import InputError

# Large enough that a piece is read and sent at full speed, and small enough that many are at once.
PIECE_BYTES = 1 << 27
MAX_AHEAD = 8
# Of a piece: what is read or cast, a part that is made contiguous, and the transfer's copy.
NUM_COPIES = 3
_Key = tuple[tuple[int, ...], tuple[int, ...]]  # first element and sizes of a share
_Sent = list[tuple["_Share", Box, jax.Array | np.ndarray]]


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
    num_ahead = max(1, min(MAX_AHEAD, budget_bytes // (NUM_COPIES * PIECE_BYTES)))
    limit = min(PIECE_BYTES, budget_bytes // (NUM_COPIES * num_ahead))
    for sent in _sent_ahead(targets.values(), max(1, limit), num_ahead):
        for share, box, values in sent:
            share.take(box, values)
    return tree.map_with_path(lambda path, _: targets[path].assembled(), abstract)


def _sent_ahead(
    targets: Iterable["_Target"],
    piece_bytes: int,
    num_ahead: int,
) -> Iterator[_Sent]:
    """The pieces of all leaves in their order, on their devices; each is read once.

    At most `num_ahead` are between a file and a device.
    """
    under_way: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(num_ahead) as pool:
        try:
            for target in targets:
                for box in target.pieces(piece_bytes):
                    under_way.append(pool.submit(target.send, box))
                    if len(under_way) == num_ahead:
                        yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for sending in under_way:
                sending.cancel()


class _Target:
    """An array that is being loaded: the shares that devices of this process hold of it."""

    def __init__(self, path: str, array: LazyArray, wanted: jax.ShapeDtypeStruct):
        self._array = array
        self._is_key = jax.dtypes.issubdtype(wanted.dtype, jax.dtypes.prng_key)
        self._wanted = _words(wanted) if self._is_key else wanted
        self._key_implementation = key_implementation(wanted) if self._is_key else None
        shape = self._wanted.shape
        if tuple(array.shape) != shape:
            raise InputError(path, tuple(array.shape), f"shape {shape}")
        self._shares: dict[_Key, _Share] = {}
        self._places: list[tuple[_Key, SingleDeviceSharding]] = []
        sharding = self._wanted.sharding
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            place = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            corner_and_sizes = box_of(index, shape)
            first = _Share(corner_and_sizes, place, self._wanted.dtype)
            self._shares.setdefault(corner_and_sizes, first)
            self._places.append((corner_and_sizes, place))

    def pieces(self, piece_bytes: int) -> Iterator[Box]:
        """Boxes that together are what the shares need, of at most so many bytes."""
        # Another process reads what only its devices hold.
        own = hull([share.box for share in self._shares.values()])
        sizes = piece_sizes(self._array, piece_bytes)
        for box in boxes(tuple(self._array.shape), sizes):
            piece = overlap(box, own)
            if self._meeting(piece):
                yield piece

    def send(self, piece: Box) -> _Sent:
        """Reads a piece and puts its parts on the devices that hold them; waits for that."""
        values = np.asarray(self._array[piece])
        # A device may go on with the memory that it is given, so an array's own is copied.
        is_own = isinstance(self._array, np.ndarray)
        values = values.astype(self._wanted.dtype, copy=is_own)
        sent = []
        for share in self._meeting(piece):
            own = overlap(piece, share.box)
            part = share.put(values[relative(own, piece)])
            sent.append((share, own, part))
        jax.block_until_ready([part for *_, part in sent])
        return sent

    def assembled(self) -> jax.Array:
        """The array, once all is written."""
        # Replicas are copied from the device that has read, not read again.
        whole = {key: share.whole() for key, share in self._shares.items()}
        parts = [jax.device_put(whole[key], place) for key, place in self._places]
        array = jax.make_array_from_single_device_arrays(
            self._wanted.shape,
            self._wanted.sharding,
            parts,
        )
        if self._is_key:
            return jax.random.wrap_key_data(array, impl=self._key_implementation)
        return array

    def _meeting(self, piece: Box) -> list["_Share"]:
        return [share for share in self._shares.values() if not is_empty(overlap(piece, share.box))]


class _Share:
    """The box of an array that a device holds, as it fills.

    In a device's own memory it fills there. What rests in host memory fills as an array of NumPy,
    because a compiled write would take it to the device.
    """

    def __init__(
        self,
        corner_and_sizes: _Key,
        place: SingleDeviceSharding,
        dtype: Any,
    ):
        corner, self._sizes = corner_and_sizes
        ends = map(operator.add, corner, self._sizes)
        self.box = tuple(map(slice, corner, ends))
        self._values: jax.Array | np.ndarray | None = None
        self._place = place
        self._dtype = dtype
        (device,) = place.device_set
        self._is_on_host = place.memory_kind not in (None, device.default_memory().kind)

    def put(self, values: np.ndarray) -> jax.Array | np.ndarray:
        """A part of it on its device."""
        return values if self._is_on_host else jax.device_put(values, self._place)

    def take(self, box: Box, part: Any) -> None:
        """Takes what has been put of a box within its own."""
        if box == self.box:
            self._values = part
            return
        if self._values is None:
            self._values = self._zeros()
        place = relative(box, self.box)
        if self._is_on_host:
            self._values[place] = part
            return
        offsets = [each.start for each in place]
        written = _writer(self._place)(self._values, part, offsets)
        # Parts that wait to be written would add up in memory.
        self._values = written.block_until_ready()

    def whole(self) -> jax.Array:
        """Its values, or zeros where it has no element; it lets go of them."""
        values, self._values = self._values, None
        if values is None:
            values = self._zeros()
        return jax.device_put(values, self._place)

    def _zeros(self) -> jax.Array | np.ndarray:
        if self._is_on_host:
            return np.zeros(self._sizes, self._dtype)
        zeros = functools.partial(jnp.zeros, self._sizes, self._dtype)
        return jax.jit(zeros, out_shardings=self._place)()


@functools.cache
def _writer(place: SingleDeviceSharding) -> Any:
    """A program that writes a piece into a share where it lies."""
    return jax.jit(
        jax.lax.dynamic_update_slice,
        donate_argnums=0,
        out_shardings=place,
    )


def _words(key: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What is stored of a key of JAX's own type."""
    words = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(
        words.shape,
        words.dtype,
        sharding=key.sharding,
    )
