"""Optimizer state on the host: the same bits, where each leaf rests, checkpoints there and back, bytes compiled."""

import dataclasses
import math
import types

import jax
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.launch.ahead_of_time import (
    compile_with_host,
    described_devices,
    has_plugin,
    memory_of,
)
from jaxscale.models.config import ModelConfig
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import abstract_batch, place
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.host import HOST, check_host_memory, parts
from jaxscale.train.inspect import bytes_per_device
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.plan import TrainConfig, make_plan
from jaxscale.train.state import rests_on_host
from jaxscale.train.step import make_step
from jaxscale.types import InputError

LONG = pytest.mark.long
MODEL = ModelConfig(
    vocab_size=32,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=32,
    max_length=16,
)
DATA = DataConfig(sources=(TextSource(("unread",)),), sequence_length=16, batch_size=8)
ADAMW, MUON = (
    OptimizerConfig(name=name, learning_rate=0.01, epsilon=1.0) for name in ("adamw", "muon")
)
SHARDED = MeshConfig(data=2, zero=1)


def on_host(mesh):
    return dataclasses.replace(mesh, is_optimizer_on_host=True)


def run(setup, *batches, state=None):
    state = setup.start() if state is None else state
    for batch in batches:
        state, _ = setup.step(state, place(setup.plan.mesh, batch))
    return state


def flat(state):
    """Every leaf as a copy in numpy by path, the random key by its words."""
    leaves = tree.flatten(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    return {path: np.array(leaf) for path, leaf in leaves.items()}


def assert_same_bits(got, wanted):
    for path, leaf in got.items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)


@pytest.mark.parametrize(
    "optimizer, mesh",
    [
        (ADAMW, SHARDED),
        (MUON, MeshConfig(data=2, zero=3)),
        pytest.param(ADAMW, MeshConfig(data=2, zero=3), marks=LONG),
        pytest.param(MUON, SHARDED, marks=LONG),
        pytest.param(ADAMW, MeshConfig(pipeline=2), marks=LONG),
        pytest.param(MUON, MeshConfig(pipeline=2), marks=LONG),
    ],
)
def test_steps_give_the_same_bits_and_moments_rest_on_the_host(
    make_setup, make_batch, optimizer, mesh
):
    settings = dict(optimizer=optimizer, num_microbatches=mesh.pipeline)
    setup = make_setup(mesh=on_host(mesh), **settings)
    batches = [make_batch(number) for number in range(3)]
    before = setup.start()
    state = run(setup, *batches, state=before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state)))
    assert_same_bits(flat(state), flat(run(make_setup(mesh=mesh, **settings), *batches)))
    for path, leaf in tree.flatten(state).items():
        is_moment = "/mu/" in path or "/nu/" in path
        assert (leaf.sharding.memory_kind == HOST) == is_moment, path
        assert leaf.sharding.is_equivalent_to(
            tree.flatten(setup.plan.state)[path].sharding, leaf.ndim
        ), path


@LONG
def test_one_device_differs_by_rounding_alone(make_setup, make_batch):
    """There the compiler joins the last of the gradient with the update, and rounds once where it rounded twice."""
    got, wanted = (
        flat(run(make_setup(mesh=mesh), make_batch()))
        for mesh in (on_host(MeshConfig()), MeshConfig())
    )
    for path, leaf in got.items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-6, atol=1e-8, err_msg=path)


def test_a_bad_batch_leaves_the_state(make_setup, make_batch):
    setup, good = make_setup(mesh=on_host(SHARDED), optimizer=ADAMW), make_batch()
    before = run(setup, good)
    wanted = flat(before)
    after = run(setup, good | {"weights": good["weights"] * np.float32(np.nan)}, good, state=before)
    assert not after.is_finite
    assert_same_bits(flat(after), wanted | {"is_finite": np.bool_(False)})


def test_bytes_are_those_that_inspect_tells(make_setup):
    setup = make_setup(mesh=on_host(SHARDED), optimizer=ADAMW)
    told = bytes_per_device(
        setup.first.params,
        setup.plan.region.specs,
        ADAMW,
        TrainConfig(steps=10),
        Policy(),
        on_host(SHARDED),
    )
    held = {HOST: 0, "device": 0}
    for leaf in jax.tree.leaves(setup.first.opt_state):
        held[leaf.sharding.memory_kind] += leaf.addressable_shards[0].data.nbytes
    assert held == {HOST: told["on the host"], "device": told["optimizer"]}
    assert told["sum"] == told["parameters"] + told["gradients"] + told["optimizer"]


def test_a_checkpoint_is_of_the_step_at_which_it_was_saved(make_setup, make_batch, tmp_path):
    """Later steps write over the moments, in the host's memory too, while the file is still being written."""
    setup = make_setup(mesh=on_host(SHARDED), optimizer=ADAMW)
    state = run(setup, make_batch())
    wanted = flat(state)
    checkpoints = Checkpoints(
        CheckpointConfig(str(tmp_path), save_every=1, keep_last=1), fingerprint={}
    )
    checkpoints.save(1, setup.plan.to_canonical(state), {})
    run(setup, make_batch(1), make_batch(2), state=state)
    restored = setup.plan.from_canonical(checkpoints.restore(setup.plan.canonical_state)[0])
    checkpoints.close()
    assert_same_bits(flat(restored), wanted)


# What stages hold, by rows of a stack: the layer of each, None where there is none.
UNEVEN = MeshConfig(pipeline=2), (0, 1, 2, None)
INTERLEAVED = (
    MeshConfig(pipeline=2, schedule="interleaved", num_chunks=2, stage_periods=(2, 1, 1, 1)),
    (0, 1, 3, None, 2, None, 4, None),
)


def distinct(plan, rows):
    """The moments by path: of each leaf its own number, of a stack's row also its layer's, and nothing in padding."""
    by_row, found = np.array([np.nan if layer is None else layer / 8 for layer in rows]), {}
    dims = tree.flatten(plan.dims.opt_state)
    for number, (path, leaf) in enumerate(tree.flatten(plan.state.opt_state).items(), 1):
        found[path] = np.full(leaf.shape, number, leaf.dtype)
        if dims[path].startswith("L"):
            found[path] = np.nan_to_num((found[path].T + by_row).T)
    return found


@pytest.mark.parametrize(
    "staged, first, second",
    [(UNEVEN, True, False), (UNEVEN, False, True), (INTERLEAVED, False, False)],
    ids=["uneven_on_host", "uneven_to_host", "interleaved"],
)
def test_checkpoints_go_there_and_back(make_setup, tmp_path, staged, first, second):
    """Between a pipeline whose stages hold unequal numbers of layers and ZeRO-1, one of them on the host or neither."""
    mesh, rows = staged
    num_layers = 1 + max(row for row in rows if row is not None)
    model = dataclasses.replace(MODEL, num_layers=num_layers)
    meshes = (
        dataclasses.replace(mesh, is_optimizer_on_host=first),
        dataclasses.replace(SHARDED, is_optimizer_on_host=second),
    )
    old, new = (
        make_setup(model=model, mesh=mesh, num_microbatches=mesh.pipeline) for mesh in meshes
    )
    given, wanted = distinct(old.plan, rows), distinct(new.plan, range(num_layers))
    moments = tree.map_with_path(
        lambda path, leaf: jax.device_put(given[path].astype(leaf.dtype), leaf.sharding),
        old.first.opt_state,
    )
    with_moments = dataclasses.replace(old.first, opt_state=moments)
    checkpoints = Checkpoints(
        CheckpointConfig(str(tmp_path), save_every=1, keep_last=1), fingerprint={}
    )
    checkpoints.save(1, old.plan.to_canonical(with_moments), {})
    restored = new.plan.from_canonical(checkpoints.restore(new.plan.canonical_state)[0])
    back = old.plan.from_canonical(checkpoints.restore(old.plan.canonical_state)[0])
    checkpoints.close()
    for setup, found in ((old, back), (new, restored)):
        kinds = [leaf.sharding.memory_kind for leaf in jax.tree.leaves(setup.first)]
        assert [leaf.sharding.memory_kind for leaf in jax.tree.leaves(found)] == kinds
    assert_same_bits(flat(back), flat(with_moments))
    for path, leaf in tree.flatten(restored.opt_state).items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)


@pytest.mark.long
@pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
def test_compiled_for_h200s_the_moments_are_not_on_the_device(make_setup):
    """Arguments fall by all of them; what is in flight is less than half of them above the step's own temporaries."""
    model = dataclasses.replace(MODEL, num_layers=1, vocab_size=8192, model_dim=256, ffn_dim=1024)
    found = {}
    for is_away in (False, True):
        mesh = dataclasses.replace(SHARDED, is_optimizer_on_host=is_away)
        devices = described_devices("h200", num_hosts=1, gpus_per_host=2)
        plan = make_plan(
            model=model,
            mesh=mesh,
            data=DATA,
            optimizer=ADAMW,
            train=TrainConfig(steps=10),
            policy=Policy(),
            stack=StackConfig(attention="reference", num_loss_chunks=1),
            devices=devices,
        )
        batch = abstract_batch(plan.mesh, 8, 16, is_packed=True)
        lowered = make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state).lower(
            plan.state, batch
        )
        flags = jax.tree.leaves(rests_on_host(plan.state, plan.region.specs, ".*"))
        found[is_away] = memory_of(compile_with_host(lowered, arguments=flags, results=flags))
    leaves = zip(jax.tree.leaves(plan.state), flags, strict=True)
    moments = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf, is_away in leaves if is_away
    )
    assert found[False].host == 0
    assert found[True].host == moments == found[False].arguments - found[True].arguments
    assert found[True].temporaries - found[False].temporaries < moments / 2


def test_parts_hold_an_eighth_or_the_largest_parameter():
    assert parts([1] * 16) == [
        range(0, 2),
        range(2, 4),
        range(4, 6),
        range(6, 8),
        range(8, 10),
        range(10, 12),
        range(12, 14),
        range(14, 16),
    ]
    assert parts([1, 8, 2, 6, 3]) == [range(0, 1), range(1, 2), range(2, 4), range(4, 5)]
    assert parts([]) == []


def test_a_backend_without_host_memory_is_refused():
    check_host_memory(jax.devices()[0])
    device = types.SimpleNamespace(platform="abacus", addressable_memories=lambda: [])
    with pytest.raises(
        InputError, match=r"is_optimizer_on_host: given True, expected False: platform 'abacus' has"
    ):
        check_host_memory(device)
