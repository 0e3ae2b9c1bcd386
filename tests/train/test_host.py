"""Optimizer state on the host: the same bits, where it rests, checkpoints, bytes compiled."""

import dataclasses
import math
import types

import jax
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.launch.ahead_of_time import (
    compile_with_host,
    described_devices,
    has_plugin,
    memory_of,
)
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import abstract_batch
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.config import TrainConfig
from jaxscale.train.host import HOST, check_host_memory, parts
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.setup import make_setup
from jaxscale.train.state import rests_on_host
from jaxscale.train.step import make_step
from jaxscale.types import InputError
from tests.train.examples import (
    OPTIMIZER,
    assert_same_bits,
    flat,
    make_batch,
    make_model,
    make_regression,
    make_stacked,
    make_training,
)
from tests.train.regression import make_rows

LONG = pytest.mark.long
MUON = OptimizerConfig(name="muon", learning_rate=0.01, epsilon=1.0)
SHARDED = MeshConfig(data=2, zero=1)


def on_host(mesh):
    return dataclasses.replace(mesh, is_optimizer_on_host=True)


def make_checkpoints(directory):
    config = CheckpointConfig(str(directory), save_every=1, keep_last=1)
    return Checkpoints(config, fingerprint={})


CASES = [
    (OPTIMIZER, SHARDED),
    (MUON, MeshConfig(data=2, zero=3)),
    (OPTIMIZER, MeshConfig(data=2, zero=3)),
    (MUON, SHARDED),
]


@pytest.mark.parametrize("optimizer, mesh", CASES[:2])
def test_steps_give_the_same_bits_and_moments_rest_on_the_host(optimizer, mesh):
    batches = [make_rows(number) for number in range(3)]
    away, here = make_regression(on_host(mesh), optimizer), make_regression(mesh, optimizer)
    assert_same_steps(away, here, batches)


@LONG
@pytest.mark.parametrize("optimizer, mesh", CASES)
def test_steps_of_a_decoder_give_the_same_bits(optimizer, mesh):
    batches = [make_batch(number) for number in range(3)]
    away = make_training(mesh=on_host(mesh), optimizer=optimizer)
    assert_same_steps(away, make_training(mesh=mesh, optimizer=optimizer), batches)


@LONG
@pytest.mark.parametrize("optimizer", [OPTIMIZER, MUON])
def test_steps_of_a_pipeline_give_the_same_bits(optimizer):
    batches = [make_batch(number) for number in range(3)]
    mesh, settings = MeshConfig(pipeline=2), dict(optimizer=optimizer, num_microbatches=2)
    away = make_training(mesh=on_host(mesh), **settings)
    assert_same_steps(away, make_training(mesh=mesh, **settings), batches)


def assert_same_steps(away, here, batches):
    """Takes the same steps with moments on the host and on the device."""
    before = away.start()
    state, _ = away.run(*batches, state=before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state)))
    wanted, _ = here.run(*batches)
    assert_same_bits(state, wanted)
    abstract = tree.flatten(away.setup.state)
    for path, leaf in tree.flatten(state).items():
        is_moment = "/mu/" in path or "/nu/" in path
        assert (leaf.sharding.memory_kind == HOST) == is_moment, path
        assert leaf.sharding.is_equivalent_to(abstract[path].sharding, leaf.ndim), path


@LONG
def test_one_device_differs_by_rounding_alone():
    """There the compiler joins the end of the gradient with the update, and rounds once less."""
    got, _ = make_training(mesh=on_host(MeshConfig())).run(make_batch())
    wanted, _ = make_training().run(make_batch())
    wanted = flat(wanted)
    for path, leaf in flat(got).items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-6, atol=1e-8, err_msg=path)


def test_a_bad_batch_leaves_the_state():
    training, good = make_regression(on_host(SHARDED)), make_rows(0)
    bad = good | {"weights": good["weights"] * np.float32(np.nan)}
    before, _ = training.run(good)
    wanted = flat(before) | {"is_finite": np.bool_(False)}
    after, _ = training.run(bad, good, state=before)
    assert not after.is_finite
    for path, leaf in flat(after).items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)


def test_a_checkpoint_is_of_the_step_at_which_it_was_saved(tmp_path):
    """Later steps write over the moments in host memory while the file is still being written."""
    training = make_regression(on_host(SHARDED))
    setup = training.setup
    state, _ = training.run(make_rows(0))
    wanted = flat(state)
    checkpoints = make_checkpoints(tmp_path)
    checkpoints.save(1, setup.to_canonical(state), {})
    training.run(make_rows(1), make_rows(2), state=state)
    saved, _ = checkpoints.restore(setup.canonical_state)
    checkpoints.close()
    for path, leaf in flat(setup.from_canonical(saved)).items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)


# What stages hold, by rows of a stack: the layer of each, None where there is none.
UNEVEN = MeshConfig(pipeline=2), (0, 1, 2, None)
INTERLEAVED = (
    MeshConfig(pipeline=2, schedule="interleaved", num_chunks=2, stage_periods=(2, 1, 1, 1)),
    (0, 1, 3, None, 2, None, 4, None),
)


def distinct(setup, rows):
    """The moments by path: a number for each leaf, plus one for each layer; 0 in padding."""
    by_row = np.array([np.nan if layer is None else layer / 8 for layer in rows])
    found = {}
    dims = tree.flatten(setup.dims.opt_state)
    for number, (path, leaf) in enumerate(tree.flatten(setup.state.opt_state).items(), 1):
        found[path] = np.full(leaf.shape, number, leaf.dtype)
        if dims[path].startswith("L"):
            found[path] = np.nan_to_num((found[path].T + by_row).T)
    return found


@pytest.mark.parametrize(
    "staged, first, second",
    [(UNEVEN, True, False), (UNEVEN, False, True), (INTERLEAVED, False, False)],
    ids=["uneven_on_host", "uneven_to_host", "interleaved"],
)
def test_checkpoints_go_there_and_back(tmp_path, staged, first, second):
    """From a pipeline with unequal stages to ZeRO-1, with either, or neither, on the host."""
    mesh, rows = staged
    num_layers = 1 + max(row for row in rows if row is not None)
    old = make_stacked(num_layers, dataclasses.replace(mesh, is_optimizer_on_host=first)).setup
    new = make_stacked(num_layers, dataclasses.replace(SHARDED, is_optimizer_on_host=second)).setup
    given, wanted = distinct(old, rows), distinct(new, range(num_layers))
    first_state = old.init(0)

    def placed(path, leaf):
        return jax.device_put(given[path].astype(leaf.dtype), leaf.sharding)

    moments = tree.map_with_path(placed, first_state.opt_state)
    with_moments = dataclasses.replace(first_state, opt_state=moments)
    checkpoints = make_checkpoints(tmp_path)
    checkpoints.save(1, old.to_canonical(with_moments), {})

    def restored(setup):
        return setup.from_canonical(checkpoints.restore(setup.canonical_state)[0])

    back, elsewhere = restored(old), restored(new)
    checkpoints.close()
    for setup, found in ((old, back), (new, elsewhere)):
        kinds = [leaf.sharding.memory_kind for leaf in jax.tree.leaves(setup.state)]
        assert [leaf.sharding.memory_kind for leaf in jax.tree.leaves(found)] == kinds
    assert_same_bits(back, with_moments)
    for path, leaf in tree.flatten(elsewhere.opt_state).items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)


@pytest.mark.long
@pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
def test_compiled_for_h200s_the_moments_are_not_on_the_device():
    """Arguments fall by all of them, and less than half of them is in flight at a time."""
    model = make_model(num_layers=1, vocab_size=8192, model_dim=256, ffn_dim=1024)
    policy, execution = Policy(), ExecutionConfig(attention="reference", num_loss_chunks=1)
    found = {}
    for is_away in (False, True):
        setup = make_setup(
            table=parameter_table(model),
            loss_fn=NextTokenLoss(model, policy, execution),
            mesh=dataclasses.replace(SHARDED, is_optimizer_on_host=is_away),
            optimizer=OPTIMIZER,
            train=TrainConfig(steps=10),
            policy=policy,
            attention_backend=execution.attention,
            devices=described_devices("h200", num_hosts=1, gpus_per_host=2),
        )
        batch = abstract_batch(setup.mesh, 8, 16, is_packed=True)
        lowered = make_step(setup).lower(setup.state, batch)
        flags = jax.tree.leaves(rests_on_host(setup.state, setup.region.specs, ".*"))
        found[is_away] = memory_of(compile_with_host(lowered, arguments=flags, results=flags))
    moments = 0
    for leaf, is_away in zip(jax.tree.leaves(setup.state), flags, strict=True):
        if is_away:
            moments += math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
    assert found[False].host == 0
    assert found[True].host == moments == found[False].arguments - found[True].arguments
    assert found[True].temporaries - found[False].temporaries < moments / 2


def test_parts_hold_an_eighth_or_the_largest_parameter():
    assert parts([1] * 16) == [range(first, first + 2) for first in range(0, 16, 2)]
    assert parts([1, 8, 2, 6, 3]) == [range(0, 1), range(1, 2), range(2, 4), range(4, 5)]
    assert parts([]) == []


def test_a_backend_without_host_memory_is_refused():
    check_host_memory(jax.devices()[0])
    device = types.SimpleNamespace(platform="abacus", addressable_memories=lambda: [])
    message = r"is_optimizer_on_host: given True, expected False: platform 'abacus' has"
    with pytest.raises(InputError, match=message):
        check_host_memory(device)
