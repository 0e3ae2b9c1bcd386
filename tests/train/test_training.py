"""A model that is no decoder trains: its own parameters, loss and loader, on a mesh, resumed."""

import dataclasses
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxscale import tree
from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.checkpoint.opening import open_checkpoint
from jaxscale.launch.runtime import RuntimeConfig
from jaxscale.parallel.mesh import BATCH_SPEC, MeshConfig
from jaxscale.train.config import TrainConfig
from jaxscale.train.loop import NonFiniteError, Outcome
from jaxscale.train.metrics import Speed, read_history
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.run_directory import held
from jaxscale.train.setup import Setup
from jaxscale.train.surroundings import surroundings
from jaxscale.train.training import train
from jaxscale.types import InputError
from tests.train.examples import make_regression
from tests.train.regression import Loader, abstract_rows

STEPS, STOP = 6, 3
ADAMW = OptimizerConfig(learning_rate=0.05, warmup_steps=2, epsilon=1e-3)
LION = OptimizerConfig(name="lion", learning_rate=0.05, warmup_steps=2)
MESH = MeshConfig(data=2, tensor=2, zero=3)
FACTS = {"fingerprint": {"network": "regression", "width": 8}}
CHECKPOINT = CheckpointConfig("checkpoints", save_every=2, keep_last=1)


def run(directory, mesh, *, evaluate=None, facts=FACTS, loader=None, config=None, optimizer=ADAMW):
    """Trains the network in a directory; what `pretrain` does for a decoder."""
    setup = make_regression(mesh, optimizer, steps=STEPS).setup
    with surroundings(directory, RuntimeConfig()) as around:
        return train(
            setup,
            loader=loader or Loader(),
            batch=abstract_rows(NamedSharding(setup.mesh, BATCH_SPEC)),
            config=config or TrainConfig(steps=STEPS, evaluate_every=STOP),
            checkpoint=CHECKPOINT,
            facts=facts,
            surroundings=around,
            speed=Speed(tokens_per_step=48, flops_per_token=1.0),
            evaluate=evaluate or (lambda params, step: {}),
        )


def figures(directory, name):
    lines = [line for line in read_history(directory / "metrics.jsonl") if name in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[name] for line in lines]


def final_state(directory, mesh):
    """(every leaf of the newest checkpoint by path, the loader's position)."""
    setup = make_regression(mesh, ADAMW, steps=STEPS).setup
    checkpoints = Checkpoints(CHECKPOINT.within(directory), **FACTS)
    state, position = checkpoints.restore(setup.canonical_state)
    checkpoints.close()
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(state).items()}, position


def assert_exported(directory, mesh, kind):
    """The newest checkpoint stands in `directory` for another system, too."""
    state, _ = final_state(directory, mesh)
    exported = open_checkpoint(directory / kind).source.leaves()
    num_states = 3 if kind == "deepspeed" else 1
    params = {path: leaf for path, leaf in state.items() if path.startswith("params/")}
    assert len(exported) == num_states * len(params)
    for path, leaf in params.items():
        name = path
        if kind == "deepspeed":
            name = f"fp32/{path.removeprefix('params/').replace('/', '.')}"
        np.testing.assert_array_equal(exported[name][()], leaf, err_msg=path)


def stop(params, step):
    if step == STOP:
        os.kill(os.getpid(), signal.SIGTERM)
    return {}


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    directory = tmp_path_factory.mktemp("regression") / "one"
    assert run(directory, MeshConfig()) == Outcome(STEPS, None)
    return directory


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """On a mesh, stopped by a signal after step STOP."""
    directory = tmp_path_factory.mktemp("regression") / "mesh"
    assert run(directory, MESH, evaluate=stop) == Outcome(STOP, signal.SIGTERM)
    return directory


def test_data_2_by_tensor_2_equals_one_device_and_resumes(on_one_device, stopped):
    assert run(stopped, MESH) == Outcome(STEPS, None)
    for name in ("loss", "squared_error", "weight", "gradient_norm", "parameter_norm"):
        wanted = figures(on_one_device, name)
        assert len(wanted) == STEPS
        np.testing.assert_allclose(figures(stopped, name), wanted, rtol=1e-5, err_msg=name)
    assert figures(stopped, "loss")[-1] < 0.9 * figures(stopped, "loss")[0]
    (got, position), (wanted, wanted_position) = (
        final_state(stopped, MESH),
        final_state(on_one_device, MeshConfig()),
    )
    assert position == wanted_position == {"number": STEPS}
    for path, leaf in got.items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_the_directory_is_locked_until_its_checkpoints_are_closed(tmp_path, monkeypatch):
    """Another run could else begin beside a save that is still written."""
    close, num_closed = Checkpoints.close, []

    def close_locked(self):
        with pytest.raises(InputError, match="no other process"), held(tmp_path):
            pass
        num_closed.append(self)
        close(self)

    monkeypatch.setattr(Checkpoints, "close", close_locked)
    run(tmp_path, MeshConfig(), config=TrainConfig(steps=1))
    assert len(num_closed) == 1


@pytest.mark.parametrize("kind", ["deepspeed", "safetensors"])
def test_the_last_checkpoint_is_also_written_for_another_system(tmp_path, kind):
    config = TrainConfig(steps=STEPS, evaluate_every=STOP, export=kind)
    assert run(tmp_path, MESH, config=config) == Outcome(STEPS, None)
    assert_exported(tmp_path, MESH, kind)


@pytest.mark.parametrize("kind", ["deepspeed", "safetensors"])
def test_a_finished_run_is_exported_at_its_next_start(on_one_device, tmp_path, kind):
    """It was killed while it exported, or is asked for it only now."""
    directory = shutil.copytree(on_one_device, tmp_path / "run")
    unfinished = directory / kind / f"global_step{STEPS}_universal.part"
    unfinished.mkdir(parents=True)
    config = TrainConfig(steps=STEPS, evaluate_every=STOP, export=kind)
    for _ in range(2):
        assert run(directory, MeshConfig(), config=config) == Outcome(STEPS, None)
        assert_exported(directory, MeshConfig(), kind)


def test_an_export_that_the_optimizer_cannot_have_is_refused_before_the_first_step(tmp_path):
    config = TrainConfig(steps=STEPS, evaluate_every=STOP, export="deepspeed")
    with pytest.raises(InputError, match="both moments of Adam, or none"):
        run(tmp_path, MeshConfig(), config=config, optimizer=LION)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_its_checkpoint_is_refused_to_another_network(on_one_device):
    other = {"fingerprint": {"network": "regression", "width": 16}}
    with pytest.raises(InputError, match="width"):
        run(on_one_device, MeshConfig(), facts=other)


def test_a_step_that_is_not_finite_is_diagnosed(tmp_path):
    """Of such a loss nothing is known but the contract, so that it is what is named."""

    class Broken(Loader):
        def __next__(self):
            batch = super().__next__()
            is_third = self.number == 3
            return batch | {"targets": batch["targets"] * np.float32(np.inf if is_third else 1)}

    message = "step 3: loss .*first non-finite: loss; the state after step 2 is saved"
    with pytest.raises(NonFiniteError, match=message):
        run(tmp_path, MeshConfig(), loader=Broken())
    assert final_state(tmp_path, MeshConfig())[1] == {"number": 2}


def test_it_starts_from_the_parameters_of_another_run(on_one_device, tmp_path, monkeypatch):
    monkeypatch.delattr(Setup, "init")  # a whole drawn state would be there beside what is read
    start = TrainConfig(steps=STEPS, init_from=str(on_one_device / "checkpoints"))
    run(tmp_path, MESH, config=start)
    assert figures(tmp_path, "loss")[0] < 0.9 * figures(on_one_device, "loss")[0]


def test_under_a_pipeline_it_is_refused_with_a_sentence():
    message = (
        r"loss: given <function squared_error .*>, expected a loss in parts that stages can run "
        r"\(start, prepare, body, finish: see .*StagedLoss\), or MeshConfig.pipeline = 1"
    )
    with pytest.raises(InputError, match=message):
        make_regression(MeshConfig(pipeline=2), ADAMW, num_microbatches=2)
