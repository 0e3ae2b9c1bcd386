"""Whole runs on a tiny corpus: stopped, killed, resumed, started from another run."""

import dataclasses
import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxscale.data.loader import make_loader
from jaxscale.data.sources import TextSource
from jaxscale.evaluate.samples import Samples
from jaxscale.run.model import load
from jaxscale.run.pretrain import pretrain
from jaxscale.train.loop import Outcome
from jaxscale.train.metrics import read_history
from jaxscale.types import InputError
from tests.run import runs
from tests.run.runs import LOSS_TOLERANCE, ROOT, STEPS, STOP, committed, losses, train

# All of the axes that cut something of a dense model but `expert`. In a branch that not all stages
# take, a permute, such as a ring could make, is silently wrong on a CPU.
OTHER_MESH = (
    "mesh.pipeline=2",
    "mesh.data=2",
    "mesh.sequence=2",
    "mesh.ring=2",
    "mesh.tensor=1",
    "mesh.zero=3",
    "train.num_microbatches=2",
)


@pytest.fixture
def resumable(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def test_the_loss_goes_down(whole):
    history = losses(whole)
    assert history[0] == pytest.approx(np.log(264), rel=0.02)
    assert np.mean(history[-3:]) < 0.75 * history[0]


def test_a_run_leaves_what_a_rerun_needs(gin_file, whole):
    written = {
        "config.gin",
        "config.0.gin",
        "starts.jsonl",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    }
    assert {path.name for path in whole.iterdir()} == written | {".lock"}
    (entry,) = map(json.loads, (whole / "starts.jsonl").read_text().splitlines())
    assert entry["step"] == 0 and entry["jax"] == jax.__version__
    assert entry["devices"].startswith("8 x ")
    assert runs.load_run(whole / "config.gin", whole) == runs.load_run(gin_file, whole)
    line = read_history(whole / "metrics.jsonl")[0]
    figures = {"loss", "gradient_norm", "parameter_norm", "tokens_per_second", "data_wait_s"}
    assert set(line) >= figures
    assert committed(whole) == [25, 30]


def test_the_saved_configuration_repeats_the_run(whole, stopped):
    """It was started from config.gin, into another directory."""
    assert losses(stopped) == losses(whole)[:STOP]
    again, first = ((each / "config.gin").read_text() for each in (stopped, whole))
    assert again == first.replace(str(whole), str(stopped))


@pytest.mark.long
def test_a_run_resumed_on_the_same_mesh_is_bit_identical(gin_file, whole, resumable):
    assert train(gin_file, resumable) == Outcome(STEPS, None)
    runs.assert_same_run(gin_file, resumable, whole)
    starts = (resumable / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, STOP]


def test_a_run_resumed_on_another_mesh_is_equal_within_rounding(gin_file, whole, resumable):
    assert train(gin_file, resumable, *OTHER_MESH) == Outcome(STEPS, None)
    runs.assert_close_run(gin_file, resumable, whole)
    assert losses(resumable)[:STOP] == losses(whole)[:STOP]
    for number, zero in ((0, 1), (STOP, 3)):
        start = runs.load_run(resumable / f"config.{number}.gin", resumable)
        assert start.mesh.zero == zero, "each start's configuration is kept"


@pytest.mark.parametrize("steps", [STEPS, STEPS - 10])
def test_a_finished_run_does_nothing_more(gin_file, whole, steps, caplog):
    def files():
        found = {}
        for path in whole.rglob("*"):
            content = path.read_bytes() if path.is_file() else None
            found[path] = content, path.stat().st_mtime_ns
        return found

    before = files()
    with caplog.at_level("INFO"):
        assert train(gin_file, whole, f"train.steps={steps}") == Outcome(STEPS, None)
    assert files() == before
    assert f"nothing to do: step {STEPS} of {steps}" in caplog.text


def test_a_resumed_run_keeps_its_seed_and_its_checkpoints_folder(gin_file, resumable):
    message = r"TrainConfig\.seed: given 1, expected the seed with which the run was begun"
    with pytest.raises(InputError, match=message):
        train(gin_file, resumable, "train.seed=1")
    message = r"directory: given 'chekpoints', expected 'checkpoints', where the run of .* 7"
    with pytest.raises(InputError, match=message):
        train(gin_file, resumable, "checkpoint.directory=chekpoints")
    assert len(losses(resumable)) == STOP


STAGED = (
    "model.num_layers=3",
    "mesh.pipeline=2",
    "mesh.data=2",
    "mesh.stage_periods=(1, 2)",
    "train.num_microbatches=2",
)


@pytest.mark.parametrize(
    ("changes", "axes"),
    [((), "data 4"), pytest.param(STAGED, "pipeline 2, data 2", marks=pytest.mark.long)],
)
def test_a_run_says_what_begins_what_is_measured_and_what_came(
    gin_file, tmp_path, caplog, changes, axes
):
    """Its samples are those of its last checkpoint, also where stages hold other layers."""
    directory = tmp_path / "run"
    short = ("train.steps=2", "train.evaluate_every=1", "checkpoint.save_every=1", *changes)
    run = runs.load_run(gin_file, directory, *short)
    samples = Samples(run.data.tokenizer, ("3 times", "5"), 8)
    run = dataclasses.replace(run, evaluators=run.evaluators | {"samples": samples})
    with caplog.at_level("INFO"):
        pretrain(run=run)
    said = [record.getMessage() for record in caplog.records if record.name.endswith("progress")]
    model, mesh, data, epoch, *evaluated, came, following = said
    assert model.startswith("model: ") and "parameters" in model
    assert mesh == f"mesh: {axes}, tensor 2"
    assert re.fullmatch(r"data: (\d+) documents of [\d,]+ tokens, (\d+) more are held out", data)
    assert sum(map(int, re.findall(r"(\d+) (?:documents|more)", data))) == 40
    assert epoch.endswith("rows of 32 tokens, 8 a step")
    assert [line.split(":")[0] for line in evaluated] == ["step 1"] * 3 + ["step 2"] * 3
    assert "held_out/bits_per_byte" in evaluated[0]
    assert came.startswith("step 2 of 2 after 0:0") and f"are in {directory}" in came
    assert "held_out/bits_per_byte" in came
    assert following.startswith(f"next: jaxscale evaluate {directory}")
    saves = [f"step {step}: saving to {directory}/checkpoints/{step}" for step in (1, 2)]
    assert [line for line in caplog.messages if ": saving to " in line] == saves
    texts = load(run).generate(samples.prompts, max_new_tokens=8)
    wanted = [prompt + text for prompt, text in zip(samples.prompts, texts, strict=True)]
    assert [read_history(directory / "metrics.jsonl")[-1][f"samples/{n}"] for n in "01"] == wanted
    assert evaluated[-1] == f"step 2: samples/1 {wanted[1]!r}"


def test_what_a_resumed_run_changes_is_said(gin_file, resumable, caplog):
    """The rate jumps where it is another one, or falls over another number of steps."""
    changes = ("optimizer.learning_rate=0.02", "optimizer.clip_norm=None")
    with caplog.at_level("INFO"):
        assert train(gin_file, resumable, f"train.steps={STOP + 1}", *changes).step == STOP + 1
    said = [line for line in caplog.messages if line.startswith("changed since the last start")]
    assert [line.split(": ")[1] for line in said] == [
        "OptimizerConfig.clip_norm 1.0 -> None",
        "OptimizerConfig.learning_rate 0.01 -> 0.02",
        f"TrainConfig.steps {STEPS} -> {STOP + 1}",
    ]
    rates = [line["learning_rate"] for line in figures(resumable)]
    assert rates[1] == pytest.approx(0.01)  # the peak, after a warm-up of two steps
    assert rates[-1] == pytest.approx(0.02 * 0.1)  # the last step has the final fraction


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.name='muon'", r"OptimizerConfig\.name: given .*muon.*, expected 'adamw', with"),
        ("train.trainable='layers.*'", r"TrainConfig\.trainable: given .*, expected '\.\*', with"),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused_by_its_name(
    gin_file, resumable, change, message
):
    with pytest.raises(InputError, match=message):
        train(gin_file, resumable, change)
    assert len(losses(resumable)) == STOP


def test_a_renamed_checkpoint_is_refused_before_a_step(gin_file, resumable):
    """Step 8 could not be saved beside a folder 9."""
    checkpoints = resumable / "checkpoints"
    (checkpoints / str(STOP)).rename(checkpoints / "9")
    with pytest.raises(InputError, match=f"given 'a folder 9', expected the name {STOP}"):
        train(gin_file, resumable)
    assert len(losses(resumable)) == STOP


def as_a_kill_before_the_first_checkpoint_leaves_it(whole, directory):
    """Its last line of figures is cut short."""
    directory.mkdir()
    for name in ("config.gin", "config.0.gin", "starts.jsonl"):
        shutil.copy(whole / name, directory)
    text = (whole / "metrics.jsonl").read_text()
    (directory / "metrics.jsonl").write_text(text[: len(text) // 8])


@pytest.mark.long
def test_a_killed_and_a_stopped_process_leave_no_trace(gin_file, whole, tmp_path):
    """SIGKILL once there is a checkpoint, then SIGTERM, which saves and exits with 143."""
    directory = tmp_path / "run"
    as_a_kill_before_the_first_checkpoint_leaves_it(whole, directory)
    process = runs.start(gin_file, directory, "checkpoint.save_every=1")
    runs.wait_for(process, lambda: committed(directory))
    process.kill()
    assert process.wait() == -signal.SIGKILL, Path(f"{directory}.log").read_text()
    before = committed(directory)[-1]
    assert len(figures(directory)) >= before
    process = runs.start(gin_file, directory, "checkpoint.save_every=1")
    runs.wait_for(process, lambda: committed(directory)[-1] > before)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143, Path(f"{directory}.log").read_text()
    assert committed(directory)[-1] == len(losses(directory)) < STEPS
    assert train(gin_file, directory) == Outcome(STEPS, None)
    runs.assert_same_run(gin_file, directory, whole)


@pytest.mark.long
@pytest.mark.parametrize("after_s", [0.3, 1.0, 2.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_first_seconds_is_heard(number, after_s, gin_file, tmp_path):
    """During imports, while the mesh starts, and while the first step is compiled."""
    directory = tmp_path / "run"
    process = runs.start(gin_file, directory, "train.steps=100000")
    time.sleep(after_s)
    process.send_signal(number)
    sent_at = time.monotonic()
    status = process.wait(timeout=60)
    log = Path(f"{directory}.log").read_text()
    assert status in (128 + number, -number), log
    assert "Traceback" not in log
    if not losses(directory):
        assert time.monotonic() - sent_at < 5, log


def figures(directory):
    return [line for line in read_history(directory / "metrics.jsonl") if "loss" in line]


@pytest.mark.long
def test_eight_kills_leave_no_trace(gin_file, tmp_path):
    """Each time the run gets at least one checkpoint further; the first kill may come before it."""
    whole, directory, steps = tmp_path / "whole", tmp_path / "run", "train.steps=200"
    train(gin_file, whole, steps)
    draw = random.Random(20)
    for number in range(8):
        before = newest(directory)
        process = runs.start(gin_file, directory, "checkpoint.save_every=1", steps)
        if number:
            runs.wait_for(process, lambda: newest(directory) > before)  # noqa: B023
        else:
            runs.wait_for(process, (directory / "starts.jsonl").exists)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0), Path(f"{directory}.log").read_text()
        assert len(figures(directory)) >= newest(directory)
    assert train(gin_file, directory, steps).signal is None
    runs.assert_same_run(gin_file, directory, whole)


def newest(directory):
    return max(committed(directory), default=0)


def test_evaluators_are_called_by_name(gin_file, tmp_path, monkeypatch):
    """Each sees the parameters after its step, and can sum the loss of a batch of its own.

    The directory is given as one in the home folder.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    short = ("train.steps=10", "checkpoint.save_every=100")
    run, seen = runs.load_run(gin_file, "~/run", *short), []

    def evaluator(context):
        seen.append(context.step)
        batch = context.place(next(make_loader(run.data)))
        total, weight, _ = context.sums(context.params, batch, jax.random.key(0))
        return {"loss": total / weight, "step": context.step}

    pretrain(run=dataclasses.replace(run, evaluators={"first": evaluator}))
    directory = tmp_path / "run"
    lines = [line for line in read_history(directory / "metrics.jsonl") if "first/loss" in line]
    assert seen == [7, 10]
    assert [line["step"] for line in lines] == [line["first/step"] for line in lines] == seen
    assert lines[1]["first/loss"] < lines[0]["first/loss"] < losses(directory)[0]
    assert committed(directory) == [10]


def test_a_run_starts_from_the_parameters_of_another(gin_file, whole, tmp_path):
    init_from = f"train.init_from={str(whole / 'checkpoints')!r}"
    short = ("train.steps=2", "optimizer.warmup_steps=1")
    train(gin_file, tmp_path, *short, "train.trainable='final_norm/scale'", init_from)
    assert losses(tmp_path)[0] < 0.8 * losses(whole)[0]
    run = runs.load_run(gin_file, tmp_path, *short, "train.trainable='final_norm/scale'")
    got, wanted = params(run, tmp_path), params(runs.load_run(gin_file, whole), whole)
    assert got.keys() == wanted.keys()
    changed = {path for path, leaf in got.items() if not np.array_equal(leaf, wanted[path])}
    assert changed == {"params/final_norm/scale"}


def params(run, directory):
    state, _ = runs.restored(run, directory)
    return {path: leaf for path, leaf in state.items() if path.startswith("params/")}


@pytest.mark.long
def test_a_pipeline_of_unequal_stages_starts_from_the_parameters_of_another_run(gin_file, tmp_path):
    """The other run's stack is in canonical order, this one's and its moments' are not."""
    short = (
        "model.num_layers=3",
        "train.steps=2",
        "optimizer.warmup_steps=1",
        "train.num_microbatches=2",
    )
    train(gin_file, tmp_path / "first", *short)
    begin = (*short, f"train.init_from={str(tmp_path / 'first/checkpoints')!r}")
    train(gin_file, tmp_path / "one", *begin)
    train(gin_file, tmp_path / "staged", *begin, *STAGED)
    wanted = losses(tmp_path / "one")
    assert wanted[0] < losses(tmp_path / "first")[0]
    np.testing.assert_allclose(losses(tmp_path / "staged"), wanted, rtol=LOSS_TOLERANCE)


def test_a_loss_of_ones_own_that_refuses_when_it_is_traced_harms_nothing(gin_file, tmp_path):
    """So does everything else that is only seen when the step is traced."""
    seen = []

    def make_loss(run):
        def loss_fn(params, batch, key, *, operations):
            raise InputError("loss", batch["tokens"].shape, "another shape")

        seen.append(run)
        return loss_fn

    directory = tmp_path / "run"
    run = dataclasses.replace(runs.load_run(gin_file, directory), loss=make_loss)
    with pytest.raises(InputError, match="another shape"):
        pretrain(run=run)
    assert seen == [run]
    assert list(directory.rglob("*.gin")) == []


def test_a_missing_start_is_named_and_nothing_created(gin_file, whole, tmp_path):
    with pytest.raises(InputError, match=r"TrainConfig.init_from: given .*absent.* there is none"):
        train(gin_file, tmp_path / "run", f"train.init_from={str(tmp_path / 'absent')!r}")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=f"there is none; {whole / 'checkpoints'} has"):
        train(gin_file, tmp_path / "run", f"train.init_from={str(whole)!r}")


@pytest.mark.long
def test_the_smallest_grin_moe_learns(gin_file, tmp_path):
    """As configured, but for a few steps, on a tiny corpus and on all eight devices."""
    file, directory = ROOT / "experiments/configs/papers/grin_moe_cpu.gin", tmp_path / "run"
    overrides = (
        "train.steps=12",
        "optimizer.warmup_steps=2",
        "runtime.num_cpu_devices=8",
        "mesh.data=8",
        f"data.cache_directory={str(tmp_path / 'cache')!r}",
    )
    sources = (TextSource((str(gin_file.parent / "corpus"),)),)
    run = runs.load_run(file, directory, *overrides)
    data = dataclasses.replace(run.data, sources=sources)
    assert pretrain(run=dataclasses.replace(run, data=data)) == Outcome(12, None)
    history = losses(directory)
    assert history[0] == pytest.approx(np.log(260), rel=0.02)
    assert history[-1] < 0.75 * history[0]
    used = read_history(directory / "metrics.jsonl")[0]
    assert 1 / 8 < used["expert_max_share"] < 1 and 0 < used["expert_entropy"] < 1
