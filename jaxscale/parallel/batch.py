"""Batches on the mesh: rows over `data` and `expert`, tokens over `sequence`."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxscale.parallel.mesh import BATCH_SPEC
from jaxscale.parallel.processes import batch_share
from jaxscale.types import Batch

TYPES = {"tokens": "int32", "labels": "int32", "weights": "float32", "segments": "int32", "positions": "int32"}


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
