"""A tiny run to train in this process or in processes of its own, and what it leaves on disk."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxscale import config, tree
from jaxscale.checkpoint.manager import Checkpoints
from jaxscale.evaluate.perplexity import BitsPerByte
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.run.pretrain import pretrain
from jaxscale.run.run import Run
from jaxscale.train.metrics import read_history
from jaxscale.train.state import TrainState

ROOT = Path(__file__).resolve().parents[2]
STEPS, STOP = 30, 7
# Sharding changes the order of float32 sums: after 30 steps at most 2e-7 of a loss and 3e-7 in a
# parameter were seen.
LOSS_TOLERANCE = 2e-6
PARAMETER_TOLERANCE = 1e-5

GIN = """
from __gin__ import dynamic_registration
from jaxscale import run
include '{root}/tests/tiny.gin'
CORPUS = ('{folder}/corpus',)
CACHE = '{folder}/cache'
DIRECTORY = %gin.REQUIRED
run.ModelConfig.num_layers = 2
run.Run.evaluators = {{'held_out': @run.BitsPerByte()}}
"""


def write_run(folder: Path) -> Path:
    """Writes a corpus and a run file that leaves the run's directory open."""
    (folder / "corpus").mkdir()
    for number in range(40):
        text = " ".join(f"{number * k % 17} times" for k in range(number % 23 + 5))
        (folder / "corpus" / f"{number}.txt").write_text(text)
    file = folder / "run.gin"
    file.write_text(GIN.format(root=ROOT, folder=folder))
    return file


def in_directory(directory: Path | str, overrides: Sequence[str]) -> list[str]:
    return [f"directory={str(directory)!r}", *overrides]


def load_run(file: Path, directory: Path | str, *overrides: str) -> Run:
    def the_run(*, run: Run) -> Run:
        return run

    return config.run(the_run, [file], in_directory(directory, overrides))


def train(file: Path, directory: Path | str, *overrides: str):
    """`pretrain` in this process, as the command line would call it."""
    return config.run(pretrain, [file], in_directory(directory, overrides))


def command(file: Path, directory: Path | str, *overrides: str) -> list[str]:
    settings = [f"--set={each}" for each in in_directory(directory, overrides)]
    return [sys.executable, "-m", "jaxscale", "pretrain", str(file), *settings]


def start(file: Path, directory: Path, *overrides: str) -> subprocess.Popen:
    """`pretrain` in a process of its own."""
    with Path(f"{directory}.log").open("a") as log:
        words = command(file, directory, *overrides)
        return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)


def wait_for(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def stop_at(step: int) -> Iterator[None]:
    """Lets the evaluation after a step send this process SIGTERM, as a scheduler would."""
    evaluate = BitsPerByte.__call__

    def evaluate_and_stop(self, context):
        if context.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BitsPerByte, "__call__", evaluate_and_stop)
        yield


def restored_state(run: Run, directory: Path) -> tuple[TrainState, dict]:
    """The newest checkpoint: its state, and the loader's position."""
    checkpoints = Checkpoints(run.checkpoint.within(directory), **checkpoint_facts(run.model))
    with contextlib.closing(checkpoints):
        return checkpoints.restore(run.setup().canonical_state)


def restored(run: Run, directory: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The newest checkpoint: every leaf by path, and the loader's position."""
    state, position = restored_state(run, directory)
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(state).items()}, position


def committed(directory: Path) -> list[int]:
    """The steps of its checkpoints."""
    found = directory.glob("checkpoints/*")
    return sorted(int(each.name) for each in found if each.name.isdecimal())


def losses(directory: Path) -> list[float]:
    """The loss of each step; a step that is missing or there twice fails."""
    lines = [line for line in read_history(directory / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def evaluations(directory: Path) -> list[dict]:
    history = read_history(directory / "metrics.jsonl")
    return [line for line in history if "held_out/loss" in line]


def assert_same_run(file: Path, got: Path, wanted: Path) -> None:
    """Bit by bit: parameters, optimizer state, key, step, data position and every loss."""
    assert losses(got) == losses(wanted)
    for path, (leaf, wanted_leaf) in both_states(file, got, wanted).items():
        np.testing.assert_array_equal(leaf, wanted_leaf, err_msg=path)


def assert_close_run(file: Path, got: Path, wanted: Path) -> None:
    np.testing.assert_allclose(losses(got), losses(wanted), rtol=LOSS_TOLERANCE)
    tolerance = dict(rtol=PARAMETER_TOLERANCE, atol=PARAMETER_TOLERANCE)
    for path, (leaf, wanted_leaf) in both_states(file, got, wanted).items():
        np.testing.assert_allclose(leaf, wanted_leaf, err_msg=path, **tolerance)


def both_states(file: Path, got: Path, wanted: Path) -> dict[str, tuple]:
    """Leaves of two runs' last checkpoints by path; the data positions must be equal."""
    state, position = restored(load_run(file, got), got)
    wanted_state, wanted_position = restored(load_run(file, wanted), wanted)
    assert position == wanted_position and state.keys() == wanted_state.keys()
    return {path: (leaf, wanted_state[path]) for path, leaf in state.items()}
