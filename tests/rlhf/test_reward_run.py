"""From a language model to a reward model by gin files: what it learns, and what it then says."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxscale import cli
from jaxscale.run.reward import score
from jaxscale.train.metrics import read_history
from tests.rlhf.conftest import ANSWERS, PROMPTS

PAIRS = """
from __gin__ import dynamic_registration
from jaxscale import run
include '{base}/config.gin'
run.Run.directory = '{folder}/reward'
run.Run.loss = @run.reward_loss
run.ModelConfig.use_value_head = True
run.TrainConfig.init_from = '{base}/checkpoints'
run.TrainConfig.init_changes = @run.Changes()
run.Changes.drawn = '(?!params/).*|params/value_head/.*'
run.Run.evaluators = {{'preferences': @run.PreferenceAccuracy()}}
run.DataConfig.sources = (@run.PreferenceSource(),)
run.PreferenceSource.paths = ('{folder}/pairs.jsonl',)
run.PreferenceSource.tokenizer = '{folder}'
run.TrainConfig.steps = 20
run.TrainConfig.evaluate_every = 20
run.OptimizerConfig.learning_rate = 0.02
"""
FEW = """
run.PreferenceSource.paths = ('{folder}/few.jsonl',)
run.DataConfig.held_out_fraction = 0.999999
"""
NUM_FEW = 3


def test_a_reward_model_learns_from_a_language_model_and_scores_as_it_was_evaluated(folder, capsys):
    """The template writes a line's end and a document's behind an answer; neither is scored."""
    file = folder / "rewarded.gin"
    file.write_text(PAIRS.format(folder=folder, base=folder / "base"))
    assert cli.main(["pretrain", str(file)]) == 0
    assert f"or jaxscale score {folder}/reward --set texts=a" in capsys.readouterr().err
    history = read_history(folder / "reward" / "metrics.jsonl")
    steps = [line for line in history if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["margin"] == 0
    assert steps[-1]["accuracy"] == 1 and steps[-1]["loss"] < 0.3
    (held_out,) = [line for line in history if "preferences/accuracy" in line]
    assert held_out["preferences/accuracy"] == 1 and held_out["preferences/margin"] > 1
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "few.jsonl").write_text("\n".join(lines[:NUM_FEW]))
    few = folder / "few.gin"
    few.write_text((PAIRS + FEW).format(folder=folder, base=folder / "base"))
    words = ["--set=evaluators={}", "--set=mesh.data=8", "--set=mesh.tensor=1"]
    assert cli.main(["evaluate", str(few), *words]) == 0
    figures = json.loads((folder / "reward" / "evaluation_20.json").read_text())
    both = [
        score(run=folder / "reward", texts=tuple(ANSWERS.values()), prompt=prompt)
        for prompt in PROMPTS[:NUM_FEW]
    ]
    chosen, rejected = np.mean(both, 0)
    assert figures["held_out/chosen_reward"] == pytest.approx(chosen, rel=1e-4)
    assert figures["held_out/rejected_reward"] == pytest.approx(rejected, rel=1e-4)
    capsys.readouterr()
    texts = f"--set=texts={tuple(ANSWERS.values())}"
    assert cli.main(["score", str(folder / "reward"), f"--set=prompt={PROMPTS[1]}", texts]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"{each:.4f}" for each in both[1]]


IMPORTED = """
run.Run.directory = '{folder}/of_imported'
run.Run.evaluators = {{}}
run.Changes.left_out = 'params/head/.*'
run.PreferenceSource.paths = ('{fixture}/pairs.jsonl',)
run.PreferenceSource.tokenizer = '{fixture}'
run.DataConfig.cache_directory = '{folder}/cache'
run.DataConfig.held_out_fraction = 0.0
run.DataConfig.batch_size = 8
run.MeshConfig.data = 8
run.TrainConfig.trainable = '.*_lora/[ab]|value_head/.*'
run.TrainConfig.steps = 2
"""


@pytest.mark.long
def test_an_imported_language_model_becomes_a_reward_model_by_adapters(folder, capsys):
    """Its head is dropped; adapters and the value head alone are trained, and merged for others."""
    base, fixture = folder / "of_adapters", Path(__file__).parent / "fixtures" / "trl"
    assert cli.main(["import", str(fixture), f"--set=directory={folder / 'imported'}"]) == 0
    assert cli.main(["adapt", str(folder / "imported"), str(base), "--set=lora.rank=2"]) == 0
    text = PAIRS + IMPORTED
    file = folder / "of_imported.gin"
    file.write_text(text.format(folder=folder, base=base, fixture=fixture))
    assert cli.main(["pretrain", str(file)]) == 0
    first, second = read_history(folder / "of_imported" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(second["loss"] - math.log(2)) > 1e-4
    run, exported = folder / "of_imported", folder / "exported"
    assert cli.main(["export", str(run), str(exported)]) == 0
    texts = ("Yes.", "No, never.")
    yes, no = score(run=run, texts=texts, prompt="Is 7 even?")
    assert yes != no
    assert score(run=exported, texts=texts, prompt="Is 7 even?") == pytest.approx([yes, no], 1e-5)
    capsys.readouterr()
    assert cli.main(["export", str(run), str(folder / "peft"), "--set=is_peft=True"]) != 0
    assert "adapters alone, beside which a value head would be lost" in capsys.readouterr().err


BAD = {
    "the next token's loss": ("run.Run.loss = @run.next_token_loss", "learn rejected answers too"),
    "no value head": ("run.ModelConfig.use_value_head = False", "ModelConfig.use_value_head"),
    "chats": (
        "run.DataConfig.sources = (@run.ChatSource(),)\nrun.Run.evaluators = {}",
        "PreferenceSource for reward_loss",
    ),
    "a pipeline": ("run.MeshConfig.pipeline = 2", "MeshConfig.pipeline: given 2, expected 1"),
    "compared": ("run.reward_loss.compared = 'mean'", "reward_loss.compared: given 'mean'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_with_rewards_is_refused_before_anything_is_written(folder, capsys, name):
    binding, message = BAD[name]
    file = folder / "bad.gin"
    text = PAIRS.format(folder=folder, base=folder / "base")
    file.write_text(f"{text}run.Run.directory = '{folder}/bad'\n{binding}\n")
    assert cli.main(["pretrain", str(file)]) != 0
    assert message in capsys.readouterr().err
    assert not (folder / "bad").exists()
