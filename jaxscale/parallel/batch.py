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


def abstract_batch(mesh: Mesh, batch_size: int, length: int, *, is_packed: bool) -> Batch:
    """A global batch [batch_size, length] as shapes with shardings; rows of one document have no segments."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {
        name: jax.ShapeDtypeStruct((batch_size, length), dtype, sharding=sharding)
        for name, dtype in TYPES.items()
        if is_packed or name != "segments"
    }


def place(mesh: Mesh, batch: Batch) -> Batch:
    """This process's share of the global batch, numpy, to its devices."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    index, count = batch_share(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        first, size = index * len(rows), count * len(rows)

        def shard(where: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = where[0].indices(size)
            return rows[start - first : stop - first, *where[1:]]

        return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, shard)

    return jax.tree.map(put, batch)


@functools.cache
def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which rows of each global batch this process reads: share `index` of `count` equal ones.

    Processes that hold other layers, positions or columns for the same rows read the same share.

    Raises:
        InputError: the devices of some process do not make up one share.
    """
    num_shards = mesh.shape[DATA] * mesh.shape[EXPERT]
    kept = (AXES.index(DATA), AXES.index(EXPERT))
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = np.moveaxis(owners, kept, (0, 1)).reshape(num_shards, -1)
    for process in np.unique(owners):
        held = np.flatnonzero((owners == process).any(axis=1))
        if num_shards % len(held) or held[0] % len(held) or held[-1] - held[0] + 1 != len(held):
            raise InputError(
                "MeshConfig",
                tuple(mesh.devices.shape),
                "axes that give each process whole shares of the batch: of "
                f"data * expert = {num_shards} shares, process {process} holds parts of {held.tolist()}",
            )
    held = np.flatnonzero((owners == jax.process_index()).any(axis=1))
    return int(held[0]) // len(held), num_shards // len(held)
