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
    q, embed = jax.random.split(jax.random.key(seed))
    params = {
        "layers": {"0": {"attention": {"q": jax.random.normal(q, (2, dim, 8))}}},
        "embed": jax.random.normal(embed, (dim, 8), jnp.bfloat16),
    }
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    state = {
        "step": jnp.int32(7),
        "params": params,
        "opt_state": opt_state,
        "key": jax.random.key(seed + 1),
    }
    return jax.device_put(state, shardings(state, mesh))


def shardings(state, mesh):
    def spec(leaf):
        return (
            PartitionSpec(*(None,) * (leaf.ndim - 2), "data", "tensor")
            if leaf.ndim >= 2
            else PartitionSpec()
        )

    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), state)


def abstract(state, mesh):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(state, mesh),
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def open_at(directory, *, fingerprint=FINGERPRINT, defaults=None, **settings):
    config = CheckpointConfig(
        **{"directory": str(directory), "save_every": 1, "keep_last": 10, **settings}
    )
    return Checkpoints(config, fingerprint=fingerprint, defaults=defaults)


def committed(directory):
    return sorted(
        int(path.name) for path in pathlib.Path(directory).iterdir() if path.name.isdecimal()
    )


def saved_steps(directory, *step_numbers):
    """Saves a state of its own seed at each step on one device; returns the states by step."""
    mesh, states = mesh_of(1, 1), {}
    checkpoints = open_at(directory)
    for step in step_numbers:
        states[step] = make_state(mesh, seed=step)
        checkpoints.save(step, states[step], {"position": step})
    checkpoints.close()
    return states
