"""A run goes on from another's whole state though its parameters are not the same."""

import numpy as np
import pytest

from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.types import InputError
from tests.run import runs

ENDS = runs.STEPS + 2


def write(folder, gin_file, whole, fields):
    """A run file that starts from the whole run's checkpoints with changes."""
    lines = [f"run.{field} = {value!r}" for field, value in fields.items()]
    file = folder / "run.gin"
    file.write_text(
        "from __gin__ import dynamic_registration\n"
        "from jaxscale import run\n"
        f"include '{gin_file}'\n"
        f"run.TrainConfig.init_from = '{whole}/checkpoints'\n"
        f"run.TrainConfig.steps = {ENDS}\n"
        "run.TrainConfig.init_changes = @run.Changes()\n" + "\n".join(lines) + "\n"
    )
    return file


@pytest.mark.long
def test_a_head_is_added_and_all_else_goes_on(gin_file, whole, tmp_path):
    head = ".*head.*"
    fields = {"ModelConfig.is_tied": False, "Changes.drawn": head}
    file = write(tmp_path, gin_file, whole, fields)
    runs.train(file, tmp_path / "new")
    history = runs.read_history(tmp_path / "new" / "metrics.jsonl")
    assert [line["step"] for line in history if "loss" in line] == [ENDS - 1, ENDS]
    state, position = runs.restored(runs.load_run(file, tmp_path / "new"), tmp_path / "new")
    assert position["batch"] == ENDS
    before, _ = runs.restored(runs.load_run(gin_file, whole), whole)
    added = set(state) - set(before)
    assert added and all("head" in path for path in added)
    for path in before:
        if path.startswith("opt_state/") and "/mu/" in path:
            # Two steps of momentum 0.9 are far from a moment that began anew.
            old, new = (each[path].ravel() for each in (before, state))
            assert np.corrcoef(old, new)[0, 1] > 0.5, path


@pytest.mark.long
def test_an_average_is_added_and_begins_with_the_next_update(gin_file, whole, tmp_path):
    averages = "opt_state/2/.*"
    fields = {"OptimizerConfig.average_decay": 0.5, "Changes.drawn": averages}
    file = write(tmp_path, gin_file, whole, fields | {"CheckpointConfig.save_every": 1})
    runs.train(file, tmp_path / "new")
    state, _ = runs.restored(runs.load_run(file, tmp_path / "new"), tmp_path / "new")
    assert state["opt_state/2/count"] == ENDS - runs.STEPS == 2
    path = "params/embedding/tokens"
    steps = (tmp_path / "new" / "checkpoints" / str(step) for step in (ENDS - 1, ENDS))
    first, last = (NativeCheckpoint(step).leaves()[path][...] for step in steps)
    found = state[path.replace("params", "opt_state/2/average")]
    np.testing.assert_allclose(found, (first + last) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.long
def test_adapters_are_added_to_a_model_of_which_nothing_else_trains(gin_file, whole, tmp_path):
    ours, optimizer = ".*_lora/.*", "opt_state/.*"
    fields = {"Changes.drawn": f"{ours}|{optimizer}", "Changes.left_out": optimizer}
    file = write(tmp_path, gin_file, whole, fields | {"TrainConfig.trainable": ours})
    with file.open("a") as lines:
        lines.write("run.ModelConfig.lora = @run.LoraConfig()\nrun.LoraConfig.rank = 2\n")
    runs.train(file, tmp_path / "new")
    state, _ = runs.restored(runs.load_run(file, tmp_path / "new"), tmp_path / "new")
    before, _ = runs.restored(runs.load_run(gin_file, whole), whole)
    added = {path for path in state if "_lora/" in path}
    assert any(state[path].any() for path in added if path.endswith("/b"))  # drawn as zeros
    moments = [path for path in state if "/mu/" in path]
    assert moments and all("_lora/" in path for path in moments)
    for path in before:
        if path.startswith("params/"):
            np.testing.assert_array_equal(state[path], before[path], err_msg=path)


@pytest.mark.long
def test_a_part_is_frozen_and_the_rest_goes_on_with_its_moments(gin_file, whole, tmp_path):
    frozen = "(embed.*|.*norm.*)"
    fields = {"TrainConfig.trainable": f"(?!{frozen}$).*"}
    with pytest.raises(InputError, match=r"only the checkpoint has opt_state/.*embed"):
        runs.train(write(tmp_path, gin_file, whole, fields), tmp_path / "new")
    fields |= {"Changes.left_out": f"opt_state/.*/[mn]u/{frozen}"}
    file = write(tmp_path, gin_file, whole, fields)
    runs.train(file, tmp_path / "new")
    state, _ = runs.restored(runs.load_run(file, tmp_path / "new"), tmp_path / "new")
    before, _ = runs.restored(runs.load_run(gin_file, whole), whole)
    (embed,) = (path for path in before if path.startswith("params/embed"))
    np.testing.assert_array_equal(state[embed], before[embed])
    moments = [path for path in state if "/nu/" in path]
    assert moments and not any("embed" in path for path in moments)
    for path in moments:
        # Two steps leave 0.95 ** 2 of what a second moment was, and add to it.
        assert (state[path] >= 0.9 * before[path]).all(), path


def test_parameters_alone_begin_the_steps_and_the_data_anew(gin_file, whole, tmp_path):
    everything_else = "opt_state/.*|step|key"
    fields = {"Changes.drawn": everything_else, "Changes.left_out": everything_else}
    file = write(tmp_path, gin_file, whole, fields)
    runs.train(file, tmp_path / "new", "train.steps=1", "train.seed=3", "optimizer.warmup_steps=0")
    _, position = runs.restored(runs.load_run(file, tmp_path / "new"), tmp_path / "new")
    assert position["batch"] == 1
    assert runs.losses(tmp_path / "new")[0] < 3  # the other run's last were 2.4, a draw's is 5.6


def test_what_is_not_named_is_refused_before_anything_is_written(gin_file, whole, tmp_path):
    file = write(tmp_path, gin_file, whole, {"ModelConfig.is_tied": False})
    with pytest.raises(InputError, match=r"the checkpoint lacks .*head"):
        runs.train(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()
