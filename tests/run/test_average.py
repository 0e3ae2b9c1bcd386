"""A run's running average: that of the steps it saved, on any mesh, as a run of its own."""

import dataclasses

import numpy as np
import pytest

from jaxscale import cli, tree
from jaxscale.checkpoint.changes import Changes
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.run.directory import moved
from jaxscale.run.model import load
from tests.run import runs

DECAY, STEPS = 0.6, 3
EACH_STEP = (
    f"train.steps={STEPS}",
    "checkpoint.save_every=1",
    f"checkpoint.keep_last={STEPS}",
    f"optimizer.average_decay={DECAY}",
    "evaluators={}",
)


def saved(directory, step):
    leaves = NativeCheckpoint(directory / "checkpoints" / str(step)).params()
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


def test_a_run_without_averages_is_named(gin_file, tmp_path, capsys):
    directory = tmp_path / "run"
    runs.train(gin_file, directory, "train.steps=2", "checkpoint.save_every=2", "evaluators={}")
    assert cli.main(["average", str(directory), str(tmp_path / "averaged")]) == 2
    message = "expected a checkpoint of a run with OptimizerConfig.average_decay"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "averaged").exists()


def test_a_run_of_another_repeats_none_of_its_changes(gin_file, tmp_path):
    run = runs.load_run(gin_file, tmp_path / "old")
    train = dataclasses.replace(run.train, init_from="older", init_changes=Changes(drawn=".*"))
    new = moved(dataclasses.replace(run, train=train), str(tmp_path / "new"))
    assert new.train.init_from == str(tmp_path / "new" / "checkpoints")
    assert new.train.init_changes is None
