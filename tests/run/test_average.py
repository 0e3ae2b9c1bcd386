"""A run's running average: that of the steps it saved, on any mesh, as a run of its own."""

import contextlib
import dataclasses
import shutil

import numpy as np
import pytest

from jaxscale import cli, tree
from jaxscale.checkpoint.changes import Changes
from jaxscale.checkpoint.manager import Checkpoints
from jaxscale.checkpoint.mirror import MirrorConfig
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.run.average import average
from jaxscale.run.directory import moved
from jaxscale.run.model import load
from jaxscale.types import InputError
from tests.run import runs

DECAY, STEPS = 0.6, 3
EACH_STEP = (
    f"train.steps={STEPS}",
    "checkpoint.save_every=1",
    f"checkpoint.keep_last={STEPS}",
    f"optimizer.average_decay={DECAY}",
    "evaluators={}",
)


def saved(directory, step, within="params/"):
    leaves = NativeCheckpoint(directory / "checkpoints" / str(step)).leaves(within)
    return {path: np.float64(leaf[...]) for path, leaf in leaves.items()}


MESHES = {
    "zero": ("mesh.zero=3",),
    "moments on the host": ("mesh.is_optimizer_on_host=True",),
    "unequal stages": (
        "mesh.pipeline=2",
        "mesh.data=2",
        "train.num_microbatches=2",
        "model.num_layers=3",
    ),
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_run_is_made_of_the_average_of_all_steps(gin_file, tmp_path, mesh):
    directory, averaged = tmp_path / "run", tmp_path / "averaged"
    runs.train(gin_file, directory, *EACH_STEP, *mesh)
    assert cli.main(["average", str(directory), str(averaged)]) == 0
    wanted = saved(directory, 1)
    for step in range(2, STEPS + 1):
        new = saved(directory, step)
        wanted = {path: DECAY * old + (1 - DECAY) * new[path] for path, old in wanted.items()}
    found = tree.flatten(load(averaged).pure_params())
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-5, atol=1e-7, err_msg=path)
    last = saved(directory, STEPS)
    assert any(np.abs(found[path] - last[path]).max() > 1e-5 for path in found)


@pytest.fixture(scope="module")
def averaging_run(gin_file, tmp_path_factory):
    """The directory of a run of STEPS steps, which keeps an average."""
    directory = tmp_path_factory.mktemp("averaging") / "run"
    runs.train(gin_file, directory, *EACH_STEP)
    return directory


def test_a_run_that_was_stopped_goes_on_with_its_average_bit_for_bit(
    gin_file, averaging_run, tmp_path
):
    directory = tmp_path / "run"
    shutil.copytree(averaging_run, directory)
    shutil.rmtree(directory / "checkpoints" / str(STEPS))
    runs.train(gin_file, directory, *EACH_STEP)
    found, wanted = (saved(each, STEPS, "opt_state/2/") for each in (directory, averaging_run))
    assert wanted["count"] == STEPS and found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_a_flipped_bit_of_an_average_is_named(averaging_run, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(averaging_run, directory)
    state = directory / "checkpoints" / str(STEPS) / "state"
    file = next(state.glob("opt_state.2.average.*ffn.up/[0-9]*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cli.main(["average", str(directory), str(tmp_path / "averaged")]) == 2
    assert "opt_state.2.average" in capsys.readouterr().err
    assert cli.main(["average", str(directory), str(tmp_path / "averaged"), "--set=step=2"]) == 0


def test_an_average_that_has_not_begun_is_refused(gin_file, averaging_run, tmp_path):
    """As where a run that gets an average stops at its first step."""
    run = runs.load_run(gin_file, averaging_run, *EACH_STEP)
    state, position = runs.restored_state(run, averaging_run)
    clip, moments, averages = state.opt_state
    begun = averages._replace(count=averages.count * 0)
    state = dataclasses.replace(state, opt_state=(clip, moments, begun))
    config = run.checkpoint.within(tmp_path)
    with contextlib.closing(Checkpoints(config, **checkpoint_facts(run.model))) as checkpoints:
        checkpoints.save(STEPS, state, position, force=True)
    run = dataclasses.replace(run, directory=str(tmp_path))
    with pytest.raises(InputError, match="expected a checkpoint after the first update"):
        average(run=run, directory=str(tmp_path / "averaged"))


@pytest.mark.long
def test_what_is_frozen_is_as_it_was(gin_file, tmp_path):
    """Adapters have an average; the model that they adapt has none."""
    frozen = ("train.trainable='.*norm.*'", "optimizer.weight_decay=0.0")
    directory, averaged = tmp_path / "run", tmp_path / "averaged"
    runs.train(gin_file, directory, *EACH_STEP, *frozen)
    assert cli.main(["average", str(directory), str(averaged)]) == 0
    found, last = saved(averaged, 0), saved(directory, STEPS)
    assert found.keys() == last.keys()
    for path, leaf in last.items():
        assert ("norm" in path) == (found[path] != leaf).any(), path


def test_a_run_without_averages_is_named(gin_file, tmp_path, capsys):
    directory = tmp_path / "run"
    runs.train(gin_file, directory, "train.steps=2", "checkpoint.save_every=2", "evaluators={}")
    assert cli.main(["average", str(directory), str(tmp_path / "averaged")]) == 2
    message = "expected a checkpoint of a run with OptimizerConfig.average_decay"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "averaged").exists()


def test_a_run_of_another_has_neither_its_changes_nor_its_mirror(gin_file, tmp_path):
    run = runs.load_run(gin_file, tmp_path / "old")
    train = dataclasses.replace(run.train, init_from="older", init_changes=Changes(drawn=".*"))
    checkpoint = dataclasses.replace(run.checkpoint, mirror=MirrorConfig("s3://bucket/old"))
    old = dataclasses.replace(run, train=train, checkpoint=checkpoint)
    new = moved(old, str(tmp_path / "new"))
    assert new.train.init_from == str(tmp_path / "new" / "checkpoints")
    assert new.train.init_changes is None
    assert new.checkpoint.mirror is None
