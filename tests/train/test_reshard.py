"""States of any optimizer there and back over meshes, bit by bit, and NumPy reads the same."""

import contextlib
import dataclasses
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxscale import tree
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.eight_bits import in_eight_bits
from jaxscale.train.state import abstract_state
from tests.train.examples import make_stacked
from tests.train.test_host import make_checkpoints

NUM_LAYERS = 5
MESHES = {
    "data": MeshConfig(data=4, zero=3),
    "tensor": MeshConfig(data=2, tensor=2, zero=1),
    "stages": MeshConfig(pipeline=2, data=2, zero=2),
    "chunks": MeshConfig(pipeline=2, schedule="interleaved", num_chunks=2, data=2),
}
OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "lion": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
    "adamw in 8 bits": in_eight_bits(optax.adamw(1e-3)),
    "muon": optax.contrib.muon(1e-3),
    "accumulated": optax.MultiSteps(optax.chain(optax.ema(0.9), optax.adamw(1e-3)), 4),
}


def make_setup(mesh, optimizer):
    """The setup of a stack of layers on a mesh with any optimizer of optax."""
    setup = make_stacked(NUM_LAYERS, mesh).setup
    region = setup.region
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    state = abstract_state(
        setup.table,
        optimizer,
        mesh=setup.mesh,
        specs=region.specs,
        dtype="float32",
        trainable=region.trainable,
    )
    return dataclasses.replace(setup, optimizer=optimizer, state=state)


def drawn(setup):
    """A canonical state of numbers that differ by leaf and element."""

    def one(path, leaf):
        draw = np.random.default_rng(zlib.crc32(path.encode()))
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(7), leaf.sharding)
        values = draw.normal(size=leaf.shape) * 100
        return jax.device_put(jnp.asarray(values).astype(leaf.dtype), leaf.sharding)

    return tree.map_with_path(one, setup.canonical_state)


def words(state):
    """Every leaf as NumPy, by path."""
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(state).items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_there_and_back_over_every_mesh_is_bit_exact(tmp_path, name):
    setups = {mesh: make_setup(config, OPTIMIZERS[name]) for mesh, config in MESHES.items()}
    first = drawn(setups["data"])
    wanted = words(first)
    state = setups["data"].from_canonical(first)
    route = ["data", "stages", "tensor", "chunks", "data"]
    for step, (here, there) in enumerate(itertools.pairwise(route), 1):
        with contextlib.closing(make_checkpoints(tmp_path)) as checkpoints:
            checkpoints.save(step, setups[here].to_canonical(state), {})
            saved, _ = checkpoints.restore(setups[there].canonical_state)
        state = setups[there].from_canonical(saved)
    on_disk = NativeCheckpoint(tmp_path / str(step)).leaves()
    assert on_disk.keys() == wanted.keys()
    for path, leaf in words(setups["data"].to_canonical(state)).items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)
        read = on_disk[path][:] if leaf.ndim else on_disk[path][()]
        np.testing.assert_array_equal(read, wanted[path], err_msg=path)
