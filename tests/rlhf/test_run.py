"""From chats to preferences by gin files: a base, its adapters, and what pairs teach them."""

import json
import math

import pytest

from jaxscale import cli
from jaxscale.train.metrics import read_history

PAIRS = """
from __gin__ import dynamic_registration
from jaxscale import run
include '{folder}/adapted/config.gin'
run.Run.directory = '{folder}/aligned'
run.Run.loss = @run.dpo_loss
run.dpo_loss.beta = 0.5
run.Run.evaluators = {{'preferences': @run.PreferenceAccuracy()}}
run.DataConfig.sources = (@run.PreferenceSource(),)
run.PreferenceSource.paths = ('{folder}/pairs.jsonl',)
run.PreferenceSource.tokenizer = '{folder}'
run.TrainConfig.steps = 20
run.TrainConfig.evaluate_every = 20
run.OptimizerConfig.learning_rate = 0.05
"""


@pytest.fixture(scope="module")
def pairs(folder):
    """The gin file of the run that learns from pairs."""
    file = folder / "pairs.gin"
    file.write_text(PAIRS.format(folder=folder))
    return file


def test_a_run_learns_which_answers_are_preferred_and_says_so_of_pairs_held_out(folder, pairs):
    assert cli.main(["pretrain", str(pairs)]) == 0
    history = read_history(folder / "aligned" / "metrics.jsonl")
    steps = [line for line in history if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["accuracy"] == 1 and steps[-1]["loss"] < 0.3
    (held_out,) = [line for line in history if "preferences/accuracy" in line]
    assert held_out["preferences/accuracy"] == 1 and held_out["preferences/margin"] > 1
    words = [
        str(pairs),
        "--set=evaluators={}",
        "--set=mesh.data=8",
        "--set=mesh.tensor=1",
    ]
    assert cli.main(["evaluate", *words]) == 0
    figures = json.loads((folder / "aligned" / "evaluation_20.json").read_text())
    assert figures["held_out/margin"] == pytest.approx(held_out["preferences/margin"], rel=1e-4)


def test_what_is_trained_on_is_shown_answer_by_answer(pairs, capsys):
    words = [str(pairs), "--set=num_rows=1", "--set=num_characters=200"]
    assert cli.main(["data", *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " tokens  '" in line]
    assert len(lines) % 2 == 0 and all(line.endswith("| document ends") for line in lines)
    for chosen, rejected in zip(lines[::2], lines[1::2], strict=True):
        assert "Hi there" in chosen and "Four." in rejected


BAD = {
    "the next token's loss": ("run.Run.loss = @run.next_token_loss", "learn rejected answers too"),
    "bits per byte": (
        "run.Run.evaluators = {'held_out': @run.BitsPerByte()}",
        "PreferenceAccuracy measures pairs",
    ),
    "chats": (
        "run.DataConfig.sources = (@run.ChatSource(),)\nrun.Run.evaluators = {}",
        "PreferenceSource for dpo_loss",
    ),
    "accuracy of chats": (
        "run.DataConfig.sources = (@run.ChatSource(),)",
        "PreferenceAccuracy.data: given",
    ),
    "a pipeline": ("run.MeshConfig.pipeline = 2", "MeshConfig.pipeline: given 2, expected 1"),
    "all parameters": ("run.TrainConfig.trainable = '.*'", "the rest is the reference"),
    "length": (
        "run.PreferenceAccuracy.data = @evaluated/run.DataConfig()\n"
        "evaluated/run.DataConfig.sequence_length = 63",
        "DataConfig.sequence_length of PreferenceAccuracy: given 63, expected sequence_length % "
        "(sequence * tensor * num_loss_chunks) == 0, here 63 % (1 * 2 * 1) = 1; nearest: 62 or 64",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_with_pairs_is_refused_before_anything_is_written(folder, capsys, name):
    binding, message = BAD[name]
    file = folder / "bad.gin"
    directory = f"run.Run.directory = '{folder}/bad'"
    file.write_text("\n".join([PAIRS.format(folder=folder), directory, binding]))
    assert cli.main(["pretrain", str(file)]) != 0
    assert message in capsys.readouterr().err
    assert not (folder / "bad").exists()
