"""Batches on the mesh: rows over `data` and `expert`, tokens over `sequence`."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxscale.parallel.mesh import AXES, BATCH_SPEC, DATA, EXPERT
from jaxscale.types import Batch, InputError

TYPES = {
    "tokens": "int32",
    "labels": "int32",
    "weights": "float32",
    "segments": "int32",
    "positions": "int32",
}


def abstract_batch(
    mesh: Mesh,
    batch_size: int,
    length: int,
    *,
    is_packed: bool,
) -> Batch:
    """A global batch as shapes [batch_size, length] with shardings.

    Args:
        mesh: the device mesh.
        batch_size: rows B.
        length: tokens T of a row.
        is_packed: whether rows hold several documents; rows of one document have no segments.
    """
    shape = (batch_size, length)
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in TYPES.items()
        if is_packed or name != "segments"
    }


def place(mesh: Mesh, batch: Batch) -> Batch:
    """Puts this process's share of the global batch on its devices.

    Args:
        mesh: the device mesh.
        batch: numpy arrays [rows of this process, T], as its loader gives them.
    Returns:
        The global batch, arrays [B, T] that are sharded over the mesh.
    """
    sharding = NamedSharding(mesh, BATCH_SPEC)
    index, count = batch_share(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        first_row = index * len(rows)
        shape = (count * len(rows), *rows.shape[1:])

        def shard(where: tuple[slice, ...]) -> np.ndarray:
            # JAX asks for global rows; `rows` begins with the first that this process read.
            start, stop, _ = where[0].indices(shape[0])
            here = slice(start - first_row, stop - first_row)
            return rows[here, *where[1:]]

        return jax.make_array_from_callback(shape, sharding, shard)

    return jax.tree.map(put, batch)


@functools.cache
def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which rows of each global batch this process reads: share `index` of `count` equal ones.

    Processes that hold other layers, positions or columns for the same rows read the same share.

    Raises:
        InputError: the devices of some process do not make up one share.
    """
    owners = _owners_of_shards(mesh)
    num_shards = len(owners)
    for process in np.unique(owners):
        held = _shards_of(owners, process)
        first, last, num = held[0], held[-1], len(held)
        is_consecutive = last - first + 1 == num
        if num_shards % num or first % num or not is_consecutive:
            raise InputError(
                "MeshConfig",
                tuple(mesh.devices.shape),
                "axes that give each process whole shares of the batch: of data * expert = "
                f"{num_shards} shares, process {process} holds parts of {held.tolist()}",
            )
    held = _shards_of(owners, jax.process_index())
    num = len(held)
    return int(held[0]) // num, num_shards // num


def _owners_of_shards(mesh: Mesh) -> np.ndarray:
    """[data * expert, devices of a shard]: the process of each device."""
    num_shards = mesh.shape[DATA] * mesh.shape[EXPERT]
    batch_axes = (AXES.index(DATA), AXES.index(EXPERT))
    process_of = np.vectorize(lambda device: device.process_index)
    owners = process_of(mesh.devices)
    owners = np.moveaxis(owners, batch_axes, (0, 1))
    return owners.reshape(num_shards, -1)


def _shards_of(owners: np.ndarray, process: int) -> np.ndarray:
    """Numbers of the shards of which a process has a device, in ascending order."""
    is_held = (owners == process).any(axis=1)
    return np.flatnonzero(is_held)
