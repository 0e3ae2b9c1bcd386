"""Runs of two processes: one history, one checkpoint; stopped, stuck and killed ones."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxscale.launch.watchdog import EXIT_LOST_PEER
from tests.run import runs
from tests.run.runs import LOSS_TOLERANCE, ROOT, STEPS, committed, evaluations, losses

LONG = pytest.mark.long
WATCHDOG_S = 4
# The number of devices is the configuration's; the other flags are for quick compilation.
XLA_FLAGS = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)


class Processes:
    """The processes of one `jaxscale pretrain`, which share eight CPU devices."""

    def __init__(self, file, directory, *overrides, number, num_devices=8, only_last=()):
        self.directory = directory
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        devices = f"runtime.num_cpu_devices={num_devices // number}"
        self.processes, self.logs = [], []
        for index in range(number):
            settings = dict(
                launcher="explicit", coordinator=coordinator, number=number, index=index
            )
            words = [f"runtime.processes.{name}={value}" for name, value in settings.items()]
            words = [devices, *overrides, *words * (number > 1)]
            words += only_last * (index == number - 1)
            words = runs.command(file, directory, *words)
            self.logs.append(Path(f"{directory}.{time.monotonic_ns()}.log"))
            with self.logs[-1].open("w") as log:
                environment = {**os.environ, "XLA_FLAGS": XLA_FLAGS}
                started = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
            self.processes.append(started)

    def statuses(self):
        """Waits for the ends."""
        return [process.wait(timeout=200) for process in self.processes]

    def log(self, index):
        return self.logs[index].read_text()

    def all_logs(self):
        return "".join(map(self.log, range(len(self.logs))))

    def wait_for_step(self, step):
        self.wait_for(lambda: len(losses(self.directory)) >= step)

    def wait_for(self, has_come):
        deadline = time.monotonic() + 200
        while not has_come():
            assert all(process.poll() is None for process in self.processes), self.all_logs()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def start(gin_file):
    """Starts a run; whatever is left of it at the test's end is killed."""
    with contextlib.ExitStack() as stack:

        def start_run(directory, *overrides, number=2, file=gin_file, **settings):
            run = Processes(file, directory, *overrides, number=number, **settings)
            stack.callback(run.end)
            return run

        yield start_run


# Devices 0 to 3 are process 0's: each of these has an axis that crosses the processes.
CROSSING = {
    "data": ("mesh.zero=3",),
    "pipeline": ("mesh.pipeline=2", "mesh.tensor=1", "train.num_microbatches=2"),
    "sequence": ("mesh.data=1", "mesh.sequence=4", "mesh.ring=2"),
}
ONE_DEVICE = ("mesh.data=1", "mesh.tensor=1", "runtime.platform='cpu'")


@LONG
@pytest.mark.parametrize("axis", CROSSING)
def test_two_processes_train_as_one_does_and_one_goes_on(gin_file, whole, start, tmp_path, axis):
    """The whole run has another mesh; a process of one device goes on from the two's checkpoint."""
    two = start(tmp_path / "two", *CROSSING[axis])
    assert two.statuses() == [0, 0], two.all_logs()
    assert_same_figures(two.directory, whole)
    (begun,) = map(json.loads, (two.directory / "starts.jsonl").read_text().splitlines())
    assert begun["processes"] == 2 and begun["devices"].startswith("8 x ")
    assert len(list((two.directory / "tensorboard").iterdir())) == 1
    assert committed(two.directory) == [25, 30]

    shutil.rmtree(two.directory / "checkpoints" / "30")
    one = start(two.directory, *ONE_DEVICE, number=1, num_devices=1)
    assert one.statuses() == [0], one.log(0)
    assert "resumed after step 25" in one.log(0)
    assert_same_figures(one.directory, whole)
    runs.assert_close_run(gin_file, one.directory, whole)


SAMPLES = """
from __gin__ import dynamic_registration
from jaxscale import run
include '{file}'
run.Run.evaluators = {{'samples': @run.Samples()}}
run.Samples.tokenizer = @run.TokenizerConfig()
run.Samples.prompts = ('3 times', '5', '11 t')
run.Samples.max_new_tokens = 8
run.Samples.tensor = 2
run.TrainConfig.steps = 7
run.TrainConfig.evaluate_every = 7
"""


@LONG
@pytest.mark.parametrize("sizes", [("mesh.zero=3",), CROSSING["pipeline"]], ids=str)
def test_two_processes_write_the_samples_that_one_does(gin_file, start, tmp_path, sizes):
    """Four groups of two devices, of which two groups are the other process's, have three texts."""
    file = tmp_path / "samples.gin"
    file.write_text(SAMPLES.format(file=gin_file))
    texts = []
    for number in (1, 2):
        run = start(tmp_path / str(number), *sizes, number=number, file=file)
        assert run.statuses() == [0] * number, run.all_logs()
        *_, last = runs.read_history(run.directory / "metrics.jsonl")
        texts.append([last[f"samples/{n}"] for n in "012"])
    assert texts[0] == texts[1]


@LONG
def test_a_run_that_lost_a_host_goes_on_with_the_other_and_then_with_both(
    gin_file, whole, start, tmp_path
):
    """Its losses stay the same: data ranks are lost, micro-batches keep the global batch."""
    elastic = "mesh.is_elastic=True"
    directory = tmp_path / "run"
    both = start(directory, elastic, "train.evaluate_every=100000", "checkpoint.save_every=5")
    both.wait_for_step(12)
    both.wait_for(lambda: committed(directory))
    for process in both.processes:
        process.kill()
    both.end()
    newest = committed(directory)[-1]
    one = start(directory, elastic, number=1, num_devices=4)
    one.wait_for(lambda: f"resumed after step {newest}" in one.log(0))
    one.wait_for_step(newest + 4)
    one.processes[0].send_signal(signal.SIGTERM)
    assert one.statuses() == [143], one.log(0)
    assert "4 devices instead of 8: data = 2 and num_microbatches = 2" in one.log(0)
    again = start(directory, elastic)
    assert again.statuses() == [0, 0], again.all_logs()
    runs.assert_close_run(gin_file, directory, whole)


@LONG
@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("optimizer.learning_rate=0.5", "OptimizerConfig.learning_rate: given '0.5 in process 1'"),
        ("data.seed=5", "DataConfig.seed: given '5 in process 1'"),
        ("train.seed=5", "TrainConfig.seed: given '5 in process 1'"),
        ("data.held_out_fraction=0.4", "DataConfig.held_out_fraction: given '0.4 in process 1'"),
    ],
)
def test_processes_that_disagree_do_not_begin(start, tmp_path, difference, message):
    """Each would train on with exit status 0, to other parameters than the others."""
    two = start(tmp_path / "two", only_last=(difference,))
    assert two.statuses() == [2, 2], two.all_logs()
    assert message in two.log(0) and message in two.log(1)
    assert not losses(two.directory)


@LONG
def test_processes_with_other_texts_do_not_begin(gin_file, start, tmp_path):
    """As where a copy of the data lacks a file on one host."""
    files = sorted(map(str, (gin_file.parent / "corpus").iterdir()))
    fewer = (f"CORPUS={tuple(files[:-1])!r}", f"CACHE={str(tmp_path / 'cache')!r}")
    two = start(tmp_path / "two", only_last=fewer)
    assert two.statuses() == [2, 2], two.all_logs()
    assert "DataConfig.sources: given" in two.log(0)


def assert_same_figures(got, wanted):
    np.testing.assert_allclose(losses(got), losses(wanted), rtol=LOSS_TOLERANCE)
    got, wanted = evaluations(got), evaluations(wanted)
    steps = [*range(7, STEPS, 7), STEPS]
    assert [line["step"] for line in got] == [line["step"] for line in wanted] == steps
    for name in ("held_out/loss", "held_out/bits_per_byte"):
        figures = [line[name] for line in got]
        np.testing.assert_allclose(figures, [line[name] for line in wanted], rtol=LOSS_TOLERANCE)


PLACE = """
import sys
import numpy as np
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.batch import batch_share
from jaxscale.launch.runtime import ProcessesConfig, RuntimeConfig, apply_runtime
from jaxscale.parallel.batch import place

processes = ProcessesConfig("explicit", sys.argv[1], 2, int(sys.argv[2]))
apply_runtime(RuntimeConfig("cpu", num_cpu_devices=4, processes=processes), ".")
whole = np.arange(8 * 16).reshape(8, 16)
for axes in (
    {"data": 8},
    {"pipeline": 2, "data": 2, "tensor": 2},
    {"sequence": 8},
    {"data": 2, "sequence": 4},
):
    mesh = make_mesh(MeshConfig(**axes))
    index, count = batch_share(mesh)
    placed = place(mesh, {"tokens": np.split(whole, count)[index]})["tokens"]
    assert placed.shape == whole.shape
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
"""


def test_each_process_places_its_share_on_any_mesh():
    """Also where both need the same rows: each a pipeline stage, or each a part of every row."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    settings = dict(
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": XLA_FLAGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", PLACE, address, str(index)], **settings)
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


ENDLESS = ("train.steps=100000", "train.evaluate_every=100000")


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_process_stops_both_after_the_same_step(start, tmp_path, victim):
    run = start(tmp_path / "run", *ENDLESS, "checkpoint.save_every=100000")
    run.wait_for_step(3)
    run.processes[victim].send_signal(signal.SIGTERM)
    assert run.statuses() == [143, 143], run.all_logs()
    assert committed(run.directory) == [len(losses(run.directory))]
    assert_can_go_on(start, run, number=2)


def assert_can_go_on(start, run, number):
    """Two more steps from the newest checkpoint."""
    newest = committed(run.directory)[-1]
    again = start(run.directory, f"train.steps={newest + 2}", number=number)
    assert again.statuses() == [0] * number, again.log(0)
    assert f"resumed after step {newest}" in again.log(0)
    assert len(losses(again.directory)) == newest + 2


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stuck_or_dead_process_ends_the_other_within_the_stated_time(
    start, tmp_path, victim, number
):
    watched = f"runtime.watchdog_timeout_s={WATCHDOG_S}"
    # In a checkpoint the watchdog has more patience than JAX, whose message would come.
    saves = ("checkpoint.save_every=20", "checkpoint.is_async=False")
    run = start(tmp_path / "run", *ENDLESS, watched, *saves)
    run.wait_for_step(22)
    run.processes[victim].send_signal(number)
    began = time.monotonic()
    status = run.processes[1 - victim].wait(timeout=60)
    # Two more seconds for writing the stacks on a busy machine.
    assert time.monotonic() - began < 2 * WATCHDOG_S + 2
    log = run.log(1 - victim)
    if victim == 0 and number == signal.SIGKILL:
        # JAX's own client may be first to see that its coordinator is gone.
        assert status in (EXIT_LOST_PEER, -signal.SIGABRT)
        assert "process 1 of 2: failed in step " in log or "another task died" in log
    else:
        assert status == EXIT_LOST_PEER
        assert f"process {1 - victim} of 2: " in log and "Another process is stuck or dead" in log
    run.end()
    assert_can_go_on(start, run, number=1)


@pytest.mark.long
@pytest.mark.parametrize("axis", ["data", "pipeline"])
def test_a_step_that_is_not_finite_is_diagnosed_by_both(start, tmp_path, axis):
    run = start(tmp_path / "run", "train.z_loss=1e38", *CROSSING[axis])
    assert run.statuses() == [1, 1], run.all_logs()
    for index in range(2):
        assert "step 1: loss inf" in run.log(index) and "Traceback" not in run.log(index)
        assert "first non-finite: loss; the state after step 0 is saved" in run.log(index)
    assert committed(run.directory) == [0]
