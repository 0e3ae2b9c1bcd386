"""Whole runs by PPO, by gin files: what is learned, where a critic begins, what a stop changes."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from jaxscale import cli
from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.models.parameters import count_parameters, init_params, parameter_table
from jaxscale.rlhf.critic import CRITIC
from jaxscale.run.model import load
from jaxscale.run.run import load_run
from jaxscale.train.metrics import read_history
from tests.rlhf.rewarded import write_run

PPO = """
run.Run.loss = @run.ppo_loss
run.ppo_loss.kl_penalty = 0.0
run.ppo_loss.num_epochs = 2
run.RolloutConfig.num_answers = 1
run.Run.critic = @run.CriticConfig()
run.CriticConfig.model = @critic/run.ModelConfig()
critic/run.ModelConfig.use_value_head = True
critic/run.ModelConfig.num_layers = 2
critic/run.ModelConfig.is_tied = False
run.TrainConfig.steps = 4
run.CheckpointConfig.save_every = 2
run.DataConfig.batch_size = 32
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ppo")
    write_run(path, PPO)
    return path


def trained(folder, name, *words):
    """The directory of a run."""
    directory = folder / name
    words = [str(folder / "run.gin"), f"--set=directory={directory}", *words]
    assert cli.main(["pretrain", *words]) == 0
    return directory


def arrays(leaves):
    return {path: np.asarray(leaf[...]) for path, leaf in leaves.items()}


def saved(directory, step):
    """Every array of a checkpoint by its path."""
    return arrays(NativeCheckpoint(directory / "checkpoints" / str(step)).leaves())


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on_bit_for_bit(folder, capsys):
    """With its critic, both optimizer states, and two updates by the answers of each step."""
    words = ["--set=evaluators={}"]
    whole = trained(folder, "whole", *words)
    wanted = saved(whole, 4)
    assert sum(path.startswith(f"params/{CRITIC}/") for path in wanted) > 8
    shutil.copytree(whole, folder / "stopped")
    shutil.rmtree(folder / "stopped" / "checkpoints" / "4")
    found = saved(trained(folder, "stopped", *words), 4)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    history = read_history(whole / "metrics.jsonl")
    steps = [line for line in history if "value_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[1]["learning_rate"] == pytest.approx(0.02)  # of the second warm-up step
    counts = [array for path, array in wanted.items() if path.endswith("count")]
    assert counts and all(count == 8 for count in counts)
    # The schedule would take the 8 updates for the first of other 4 steps.
    file = folder / "other_epochs.gin"
    file.write_text((folder / "run.gin").read_text() + "run.ppo_loss.num_epochs = 4")
    assert cli.main(["pretrain", str(file), f"--set=directory={whole}", *words]) != 0
    message = "ppo_loss.num_epochs: given '4', expected 2, with which the run was begun"
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_what_is_rewarded_is_written_more_often_also_to_prompts_that_were_held_out(folder):
    words = ["--set=train.steps=30", "--set=checkpoint.save_every=30", "--set=data.batch_size=64"]
    directory = trained(folder, "rising", *words)
    steps = {line["step"]: line for line in read_history(directory / "metrics.jsonl")[::-1]}
    assert steps[1]["reward"] < 0.1 and steps[29]["reward"] > 0.9
    assert steps[29]["value_loss"] < 0.02 and 0 < steps[2]["clipped"] < 1
    words = [f"--set=directory={directory}", "--set=evaluators={}"]
    assert cli.main(["evaluate", str(folder / "run.gin"), *words]) == 0
    figures = json.loads((directory / "evaluation_30.json").read_text())
    assert figures["held_out/reward"] > 0.9
    run = dataclasses.replace(load_run([folder / "run.gin"]), directory=str(directory))
    (text,) = load(run).generate("a", max_new_tokens=4)
    assert any(map(str.isdigit, text))


def write_checkpoint(model, directory, seed):
    """Parameters of a trained model, as a run leaves them; returns them by path."""
    params = init_params(parameter_table(model), jax.random.key(seed), "float32")
    config = CheckpointConfig(str(directory), save_every=1, keep_last=1, is_async=False)
    checkpoints = Checkpoints(config, **checkpoint_facts(model))
    checkpoints.save(0, {"params": params}, {"depends_on": {}}, force=True)
    checkpoints.close()
    return arrays(NativeCheckpoint(directory / "0").leaves("params/"))


def test_inspect_counts_the_critic(folder, capsys):
    run = load_run([folder / "run.gin"])
    critic, _ = count_parameters(run.critic.table())
    total, _ = count_parameters(run.table())
    assert cli.main(["inspect", str(folder / "run.gin")]) == 0
    shown = capsys.readouterr().out
    assert f"parameters    {total:,} total" in shown and f"{CRITIC}/layers/" in shown
    state = critic * 4 * (2 + 2 / 8)  # parameters, gradients; ZeRO-1 shares out two moments
    (found,) = re.findall(r"^the critic +([\d.]+) KiB", shown, re.MULTILINE)
    assert float(found) * 1024 == pytest.approx(state, rel=0.01)


@pytest.mark.long
def test_policy_and_critic_begin_as_other_runs_models_and_have_their_own_rates(folder):
    run = load_run([folder / "run.gin"])
    critic = write_checkpoint(run.critic.model, folder / "reward_model", 1)
    policy = write_checkpoint(run.model, folder / "tuned", 2)
    words = ["--set=evaluators={}", "--set=train.steps=1", "--set=optimizer.warmup_steps=0"]
    words.append(f"--set=train.init_from={folder}/tuned")
    words.append(f"--set=critic.init_from={folder}/reward_model")
    words.append("--set=critic.learning_rate_factor=1e-9")
    found = saved(trained(folder, "begun", *words), 1)
    for path, array in critic.items():
        np.testing.assert_allclose(found[f"params/{CRITIC}/{path}"], array, atol=1e-9)
    moved = [np.abs(found[f"params/{path}"] - array).max() for path, array in policy.items()]
    assert min(moved) > 1e-3 and max(moved) < 0.05
    # So does another run by PPO, whose critic is a new one.
    words[3:] = ["--set=optimizer.learning_rate=1e-9"]
    again = saved(
        trained(folder, "again", *words, f"--set=train.init_from={folder}/begun/checkpoints"), 1
    )
    for path in policy:
        np.testing.assert_allclose(again[f"params/{path}"], found[f"params/{path}"], atol=1e-8)
    own = [path for path in found if path.startswith(f"params/{CRITIC}/")]
    assert max(np.abs(again[path] - found[path]).max() for path in own) > 0.01


BAD = {
    "no critic": ("run.Run.critic = None", "Run.critic: given None"),
    "a critic for another loss": (
        "run.Run.loss = @run.policy_loss\nrun.policy_loss.beta = 0.0\n"
        "run.RolloutConfig.num_answers = 8",
        "Run.critic: given 'CriticConfig(...)', expected None with PolicyLoss",
    ),
    "no rollouts": ("run.Run.rollouts = None", "Run.rollouts: given None"),
    "no adapters": ("run.ppo_loss.kl_penalty = 0.1", "ModelConfig.lora: given None"),
    "a frozen critic": ("run.TrainConfig.trainable = 'layers/.*'", "also matches 'critic/.*'"),
    "a pipeline": ("run.MeshConfig.pipeline = 2", "MeshConfig.pipeline: given 2, expected 1"),
    "logits": (
        "critic/run.ModelConfig.use_value_head = False",
        "CriticConfig.model.use_value_head",
    ),
    "a short critic": (
        "critic/run.ModelConfig.max_length = 16",
        "CriticConfig.model.max_length: given 16, expected at least 32",
    ),
    "fewer words": (
        "critic/run.ModelConfig.vocab_size = 200",
        "CriticConfig.model.vocab_size: given 200, expected at least 300",
    ),
    "a planner": (
        "run.Run.mesh = @run.PlannedMesh()\nrun.PlannedMesh.devices = 'h200:1x8'",
        "Run.mesh: given 'PlannedMesh'",
    ),
    "two beginnings": (
        "run.CriticConfig.init_from = 'there'\nrun.TrainConfig.init_from = 'here'\n"
        "run.TrainConfig.init_changes = @run.Changes()\nrun.Changes.drawn = 'step'",
        "CriticConfig.init_from: given 'there', expected None with TrainConfig.init_changes",
    ),
    "no such reward model": (
        "run.CriticConfig.init_from = '/nowhere'",
        "CriticConfig.init_from: given '/nowhere', expected a folder with a checkpoint",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_with_a_critic_is_refused_before_anything_is_written(folder, capsys, name):
    binding, message = BAD[name]
    file, directory = folder / "bad.gin", folder / name
    lines = [(folder / "run.gin").read_text(), f"run.Run.directory = '{directory}'", binding]
    file.write_text("\n".join(lines))
    assert cli.main(["pretrain", str(file)]) != 0
    assert message in capsys.readouterr().err
    assert not (directory / "metrics.jsonl").exists()
