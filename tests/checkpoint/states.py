"""States of two small meshes and folders of checkpoints for the tests of this folder."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints

FINGERPRINT = {"num_layers": 2, "attention": {"num_heads": 4, "window": None}, "pattern": (1, 2)}


def mesh_of(*shape):
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    return jax.sharding.Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))


def make_state(mesh, seed=0, dim=16):
    state = build_state(seed, dim)
    return jax.device_put(state, shardings(state, mesh))


def small_state():
    """For tests that look at folders only: saving takes time by the leaf."""
    return {"params": {"w": jnp.zeros(8)}}


def build_state(seed=0, dim=16):
    q, embed = jax.random.split(jax.random.key(seed))
    params = {
        "layers": {"0": {"attention": {"q": jax.random.normal(q, (2, dim, 8))}}},
        "embed": jax.random.normal(embed, (dim, 8), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "step": jnp.int32(7),
        "params": params,
        "opt_state": optimizer.init(params),
        "key": jax.random.key(seed + 1),
    }


def shardings(state, mesh):
    def sharding(leaf):
        if leaf.ndim < 2:
            return NamedSharding(mesh, PartitionSpec())
        first_dims = (None,) * (leaf.ndim - 2)
        return NamedSharding(mesh, PartitionSpec(*first_dims, "data", "tensor"))

    return jax.tree.map(sharding, state)


def abstract(state, mesh):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(state, mesh),
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def open_at(directory, *, fingerprint=FINGERPRINT, upgrade=lambda facts: facts, **settings):
    settings = {"save_every": 1, "keep_last": 10, **settings}
    config = CheckpointConfig(str(directory), **settings)
    return Checkpoints(config, fingerprint=fingerprint, upgrade=upgrade)


def committed(directory):
    """The committed steps in a folder, in order."""
    names = [path.name for path in pathlib.Path(directory).iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


def save_steps(directory, *steps):
    """Saves a state of another seed at each step, on one device; returns the states by step."""
    states = {}
    checkpoints = open_at(directory)
    for step in steps:
        states[step] = make_state(mesh_of(1, 1), seed=step)
        checkpoints.save(step, states[step], {"position": step})
    checkpoints.close()
    return states
