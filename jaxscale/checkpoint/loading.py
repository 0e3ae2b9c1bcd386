"""The leaves of any source onto any mesh: each device reads the boxes that it holds.

There is no save and load between: a source may as well be arrays of another mesh in this process.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxscale import tree
from jaxscale.checkpoint.boxes import box_of, boxes, chunk_shape
from jaxscale.checkpoint.source import LazyArray
from jaxscale.types import InputError

# Of a piece there are at once what is read, its copy in the wanted type, and the transfer's.
MAX_COPIES = 4


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
    shares: dict[tuple, jax.Array] = {}
    shards = []
    for device, index in own.items():
        box = box_of(index, wanted.shape)
        target = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        if box not in shares:
            shares[box] = _share(array, *box, wanted.dtype, target, piece_bytes)
        # Replicas are copied from the device that has read, not read again.
        shard = jax.device_put(shares[box], target)
        shards.append(shard)
    return jax.make_array_from_single_device_arrays(
        wanted.shape,
        wanted.sharding,
        shards,
    )


def _share(
    array: LazyArray,
    corner: tuple[int, ...],
    sizes: tuple[int, ...],
    dtype: Any,
    target: jax.sharding.Sharding,
    piece_bytes: int,
) -> jax.Array:
    """One device's box of an array, in pieces where it is larger than one."""
    itemsize = max(
        array.dtype.itemsize,
        np.dtype(dtype).itemsize,
    )

    def read(start: tuple[int, ...], size: tuple[int, ...]) -> jax.Array:
        index = tuple(slice(a, a + n) for a, n in zip(start, size))
        values = np.asarray(array[index])
        return jax.device_put(values.astype(dtype), target)

    if math.prod(sizes) * itemsize <= piece_bytes:
        return read(corner, sizes)
    zeros = functools.partial(jax.numpy.zeros, sizes, dtype)
    share = jax.jit(zeros, out_shardings=target)()
    chunk = chunk_shape(sizes, itemsize, piece_bytes)
    for box in boxes(sizes, chunk):
        offsets, size = box_of(box, sizes)
        start = tuple(map(sum, zip(corner, offsets)))
        piece = read(start, size)
        share = _write(share, piece, offsets)
        # So that no second piece waits in host memory.
        share.block_until_ready()
    return share


@functools.partial(jax.jit, donate_argnums=0)
def _write(share: jax.Array, piece: jax.Array, offsets: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(share, piece, offsets)
