"""Whole runs on a tiny corpus: stopped, killed, resumed on this and another mesh, started from another run."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxscale import config, tree
from jaxscale.checkpoint.manager import Checkpoints
from jaxscale.data.loader import make_loader
from jaxscale.data.sources import TextSource
from jaxscale.models.config import checkpoint_facts
from jaxscale.train.loop import Outcome
from jaxscale.train.metrics import read_history
from jaxscale.train.plan import make_plan
from jaxscale.train.pretrain import pretrain
from jaxscale.types import InputError

ROOT = Path(__file__).resolve().parents[2]
STEPS, STOP = 30, 7
# Sharding changes the order of float32 sums: after 30 steps at most 2e-7 of a loss and 3e-7 in a
# parameter were seen.
LOSS_TOLERANCE = 2e-6
PARAMETER_TOLERANCE = 1e-5
OTHER_MESH = ("mesh.data=2", "mesh.expert=2", "mesh.tensor=2", "mesh.zero=3")


@pytest.fixture(scope="module", autouse=True)
def _compilations(tmp_path_factory):
    """Runs of one configuration, in processes of their own too, share their compilations."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]


@pytest.fixture(scope="module")
def gin_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    for number in range(40):
        text = " ".join(f"{number * k % 17} times" for k in range(number % 23 + 5))
        path = root / "corpus" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    file = root / "run.gin"
    file.write_text(
        f"include '{ROOT / 'tests/tiny.gin'}'\nCORPUS = ('{root / 'corpus'}',)\nCACHE = '{root / 'cache'}'\n"
        "DIRECTORY = %gin.REQUIRED\n"
    )
    return file


def run(file, directory, *overrides, **more):
    """`pretrain` in this process, as the command line would call it."""

    def verb(**arguments):
        return pretrain(**arguments | more)

    return config.run(
        verb, [file], [f"directory={str(directory)!r}", *overrides], bound_as=pretrain
    )


def start(file, directory, *overrides):
    """`pretrain` in a process of its own, with eight devices unless the environment says otherwise."""
    command = [
        sys.executable,
        "-m",
        "jaxscale.cli",
        "pretrain",
        str(file),
        f"--set=directory={str(directory)!r}",
    ]
    command += [f"--set={override}" for override in overrides]
    with Path(f"{directory}.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def stop_at(step):
    """An evaluator that sends this process SIGTERM, as a scheduler would."""

    def evaluator(context):
        if context.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    return {"stop": evaluator}


def final_state(file, directory):
    """The newest checkpoint: every leaf as numpy by path."""
    fields = config.load(pretrain, [file], [f"directory={str(directory)!r}"]).arguments
    names = ("model", "mesh", "data", "optimizer", "train", "policy", "stack")
    plan = make_plan(**{name: fields[name] for name in names})
    where = dataclasses.replace(fields["checkpoint"], directory=str(directory / "checkpoints"))
    checkpoints = Checkpoints(where, **checkpoint_facts(fields["model"]))
    state, data_state = checkpoints.restore(plan.state)
    checkpoints.close()
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(state).items()}, data_state


def losses(directory):
    """The loss of each step; a step that is missing or there twice fails."""
    lines = [line for line in read_history(directory / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def assert_same_run(file, got, wanted):
    """Bit by bit: parameters, optimizer state, key, step, data position and the loss of every step."""
    assert losses(got) == losses(wanted)
    (state, data), (wanted_state, wanted_data) = final_state(file, got), final_state(file, wanted)
    assert data == wanted_data
    for path, leaf in state.items():
        np.testing.assert_array_equal(leaf, wanted_state[path], err_msg=path)


def assert_close_run(file, got, wanted):
    np.testing.assert_allclose(losses(got), losses(wanted), rtol=LOSS_TOLERANCE)
    (state, data), (wanted_state, wanted_data) = final_state(file, got), final_state(file, wanted)
    assert data == wanted_data
    for path, leaf in state.items():
        np.testing.assert_allclose(
            leaf,
            wanted_state[path],
            rtol=PARAMETER_TOLERANCE,
            atol=PARAMETER_TOLERANCE,
            err_msg=path,
        )


@pytest.fixture(scope="module")
def whole(gin_file, tmp_path_factory):
    """The directory of a run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    assert run(gin_file, directory) == Outcome(STEPS, None)
    return directory


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory):
    """The directory of a run of the whole run's config.gin that SIGTERM stopped after step STOP."""
    directory = tmp_path_factory.mktemp("stopped")
    assert run(whole / "config.gin", directory, evaluators=stop_at(STOP)) == Outcome(
        STOP, signal.SIGTERM
    )
    assert len(losses(directory)) == STOP
    return directory


@pytest.fixture
def resumable(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def test_the_loss_goes_down(whole):
    history = losses(whole)
    assert history[0] == pytest.approx(np.log(264), rel=0.02)
    assert np.mean(history[-3:]) < 0.75 * history[0]


def test_a_run_leaves_what_a_rerun_needs(gin_file, whole):
    names = {path.name for path in whole.iterdir()}
    written = {
        "config.gin",
        "config.0.gin",
        "starts.jsonl",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    }
    assert names == written | {".lock"}
    (entry,) = map(json.loads, (whole / "starts.jsonl").read_text().splitlines())
    assert (
        entry["step"] == 0
        and entry["jax"] == jax.__version__
        and entry["devices"].startswith("8 x ")
    )
    original = config.load(pretrain, [gin_file], [f"directory={str(whole)!r}"]).arguments
    assert config.load(pretrain, [whole / "config.gin"]).arguments == original | {
        "evaluators": None
    }
    line = read_history(whole / "metrics.jsonl")[0]
    assert set(line) >= {
        "loss",
        "gradient_norm",
        "parameter_norm",
        "tokens_per_second",
        "data_wait_s",
    }
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["25", "30"]


def test_a_run_resumed_on_the_same_mesh_is_bit_identical(gin_file, whole, resumable):
    assert run(gin_file, resumable) == Outcome(STEPS, None)
    assert_same_run(gin_file, resumable, whole)
    assert [
        json.loads(line)["step"] for line in (resumable / "starts.jsonl").read_text().splitlines()
    ] == [0, STOP]


def test_a_run_resumed_on_another_mesh_is_equal_within_rounding(gin_file, whole, resumable):
    assert run(gin_file, resumable, *OTHER_MESH) == Outcome(STEPS, None)
    assert_close_run(gin_file, resumable, whole)
    assert losses(resumable)[:STOP] == losses(whole)[:STOP]
    meshes = [
        config.load(pretrain, [resumable / f"config.{n}.gin"]).arguments["mesh"] for n in (0, STOP)
    ]
    assert [mesh.zero for mesh in meshes] == [1, 3], "each start's configuration is kept"


def test_a_run_resumed_on_one_device_is_equal_within_rounding(
    gin_file, whole, resumable, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", "")
    overrides = (
        "mesh.data=1",
        "mesh.tensor=1",
        "runtime.num_cpu_devices=1",
        "runtime.platform='cpu'",
    )
    assert start(gin_file, resumable, *overrides).wait(timeout=300) == 0, Path(
        f"{resumable}.log"
    ).read_text()
    assert_close_run(gin_file, resumable, whole)


@pytest.mark.parametrize("steps", [STEPS, STEPS - 10])
def test_a_finished_run_does_nothing_more(gin_file, whole, steps, caplog):
    def files():
        return {
            path: (path.is_file() and path.read_bytes(), path.stat().st_mtime_ns)
            for path in whole.rglob("*")
        }

    before = files()
    with caplog.at_level("INFO"):
        assert run(gin_file, whole, f"train.steps={steps}") == Outcome(STEPS, None)
    assert files() == before
    assert f"nothing to do: step {STEPS} of {steps}" in caplog.text


def test_a_resumed_run_keeps_its_seed_and_its_checkpoints_folder(gin_file, resumable):
    with pytest.raises(
        InputError,
        match=r"TrainConfig\.seed: given 1, expected the seed with which the run was begun",
    ):
        run(gin_file, resumable, "train.seed=1")
    with pytest.raises(
        InputError,
        match=r"directory: given 'chekpoints', expected 'checkpoints', where the run of .* 7",
    ):
        run(gin_file, resumable, "checkpoint.directory=chekpoints")
    assert len(losses(resumable)) == STOP


def test_the_home_folder_may_be_written_as_a_tilde(gin_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(gin_file, "~/run", "train.steps=2", "optimizer.warmup_steps=1")
    assert (tmp_path / "run" / "metrics.jsonl").exists() and (
        tmp_path / "run" / "checkpoints" / "2"
    ).exists()


def test_sigterm_saves_and_exits_143(gin_file, whole, tmp_path):
    directory = tmp_path / "run"
    process = start(gin_file, directory, "train.steps=100000", "checkpoint.save_every=100000")
    wait_for(process, lambda: len(read_history(directory / "metrics.jsonl")) > 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    finished = len(losses(directory))
    assert [path.name for path in (directory / "checkpoints").iterdir()] == [str(finished)]


def wait_for(process, condition):
    deadline = time.monotonic() + 300
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def newest_step(directory):
    return max(
        (int(path.name) for path in directory.glob("checkpoints/*") if path.name.isdecimal()),
        default=0,
    )


def kill_again_and_again(file, directory, whole, num_kills, *overrides):
    """Each time the run gets at least one checkpoint further; the first kill may come before the first one."""
    draw = random.Random(num_kills)
    for number in range(num_kills):
        before = newest_step(directory)
        process = start(file, directory, "checkpoint.save_every=1", *overrides)
        if number:
            wait_for(process, lambda: newest_step(directory) > before)  # noqa: B023
        else:
            wait_for(process, (directory / "starts.jsonl").exists)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0), Path(f"{directory}.log").read_text()
        lines = read_history(directory / "metrics.jsonl")
        assert len([line for line in lines if "loss" in line]) >= newest_step(directory)
    assert run(file, directory, *overrides).signal is None
    assert_same_run(file, directory, whole)


def test_three_kills_leave_no_trace(gin_file, whole, tmp_path):
    kill_again_and_again(gin_file, tmp_path / "run", whole, 3)


@pytest.mark.long
def test_twenty_kills_leave_no_trace(gin_file, tmp_path):
    run(gin_file, tmp_path / "whole", "train.steps=200")
    kill_again_and_again(gin_file, tmp_path / "run", tmp_path / "whole", 20, "train.steps=200")


def test_evaluators_are_called_by_name(gin_file, tmp_path):
    """Each sees the parameters after its step, and can sum the loss of a batch of its own."""
    seen = []

    def evaluator(context):
        seen.append(context.step)
        loader = make_loader(config.load(pretrain, [gin_file], ["directory=x"]).arguments["data"])
        total, weight, _ = context.sums(
            context.params, context.place(next(loader)), jax.random.key(0)
        )
        return {"loss": total / weight, "step": context.step}

    run(
        gin_file,
        tmp_path,
        "train.steps=10",
        "checkpoint.save_every=100",
        evaluators={"first": evaluator},
    )
    lines = [line for line in read_history(tmp_path / "metrics.jsonl") if "first/loss" in line]
    assert (
        seen
        == [7, 10]
        == [line["step"] for line in lines]
        == [line["first/step"] for line in lines]
    )
    assert lines[1]["first/loss"] < lines[0]["first/loss"] < losses(tmp_path)[0]


def test_a_run_starts_from_the_parameters_of_another(gin_file, whole, tmp_path):
    init_from = f"train.init_from={str(whole / 'checkpoints')!r}"
    overrides = (
        "train.steps=2",
        "optimizer.warmup_steps=1",
        "train.trainable='final_norm/scale'",
        init_from,
    )
    run(gin_file, tmp_path, *overrides)
    names = {path for path in final_state(gin_file, whole)[0] if path.startswith("params")}
    wanted = final_state(gin_file, whole)[0]
    assert losses(tmp_path)[0] < 0.8 * losses(whole)[0]
    got = restore_params(gin_file, tmp_path)
    assert {f"params/{path}" for path in got} == names
    changed = {
        path for path, leaf in got.items() if not np.array_equal(leaf, wanted[f"params/{path}"])
    }
    assert changed == {"final_norm/scale"}


@pytest.mark.long
def test_a_pipeline_of_unequal_stages_starts_from_the_parameters_of_another_run(gin_file, tmp_path):
    """The other run's stack is in canonical order, this one's permuted and padded, its optimizer state too."""
    short = (
        "model.num_layers=3",
        "train.steps=2",
        "optimizer.warmup_steps=1",
        "train.num_microbatches=2",
    )
    run(gin_file, tmp_path / "first", *short)
    start = (*short, f"train.init_from={str(tmp_path / 'first/checkpoints')!r}")
    run(gin_file, tmp_path / "one", *start)
    run(
        gin_file,
        tmp_path / "staged",
        *start,
        "mesh.pipeline=2",
        "mesh.data=2",
        "mesh.stage_periods=(1, 2)",
    )
    assert losses(tmp_path / "one")[0] < losses(tmp_path / "first")[0]
    np.testing.assert_allclose(
        losses(tmp_path / "staged"), losses(tmp_path / "one"), rtol=LOSS_TOLERANCE
    )


def restore_params(file, directory):
    fields = config.load(pretrain, [file], [f"directory={str(directory)!r}"]).arguments
    where = dataclasses.replace(fields["checkpoint"], directory=str(directory / "checkpoints"))
    checkpoints = Checkpoints(where, **checkpoint_facts(fields["model"]))
    names = ("model", "mesh", "data", "optimizer", "train", "policy", "stack")
    params = checkpoints.restore_params(
        make_plan(**{name: fields[name] for name in names}).state.params
    )
    checkpoints.close()
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}


def test_a_loss_of_ones_own_that_refuses_when_it_is_traced_harms_nothing(gin_file, tmp_path):
    """So does everything else that is only seen when the step is traced."""
    seen = {}

    def make_loss(**settings):
        def loss_fn(params, batch, key, *, operations):
            raise InputError("loss", batch["tokens"].shape, "another shape")

        seen.update(settings)
        return loss_fn

    with pytest.raises(InputError, match="another shape"):
        run(gin_file, tmp_path / "run", make_loss=make_loss)
    assert seen.keys() == {"model", "policy", "stack", "z_loss"}
    assert list((tmp_path / "run").rglob("config.gin")) == []


def test_a_missing_start_is_named_and_nothing_created(gin_file, whole, tmp_path):
    with pytest.raises(InputError, match=r"TrainConfig.init_from: given .*absent.* there is none"):
        run(gin_file, tmp_path / "run", f"train.init_from={str(tmp_path / 'absent')!r}")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=f"there is none; {whole / 'checkpoints'} has"):
        run(gin_file, tmp_path / "run", f"train.init_from={str(whole)!r}")


@pytest.mark.long
def test_the_smallest_grin_moe_learns(gin_file, tmp_path):
    """As configured, but for a few steps, on a tiny corpus and on all devices: this process cannot go back to one."""
    file = ROOT / "experiments/configs/papers/grin_moe_cpu.gin"
    data = config.load(
        pretrain, [file], [f"data.cache_directory={str(tmp_path / 'cache')!r}"]
    ).arguments["data"]
    data = dataclasses.replace(data, sources=(TextSource((str(gin_file.parent / "corpus"),)),))
    overrides = (
        "train.steps=12",
        "optimizer.warmup_steps=2",
        "runtime.num_cpu_devices=8",
        "mesh.data=8",
    )
    assert run(file, tmp_path / "run", *overrides, data=data) == Outcome(12, None)
    history = losses(tmp_path / "run")
    assert history[0] == pytest.approx(np.log(260), rel=0.02)
    assert history[-1] < 0.75 * history[0]
    used = read_history(tmp_path / "run" / "metrics.jsonl")[0]
    assert 1 / 8 < used["expert_max_share"] < 1 and 0 < used["expert_entropy"] < 1
