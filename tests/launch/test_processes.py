"""What each launcher's variables mean to JAX, bad ones, and which rows a process reads."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import Mesh

from jaxscale.launch.processes import (
    LAUNCHERS,
    ProcessesConfig,
    start_arguments,
    start_processes,
)
from jaxscale.parallel.batch import batch_share
from jaxscale.parallel.mesh import AXES
from jaxscale.types import InputError, RunError

ROOT = Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[03-06]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
GPUS = "CUDA_VISIBLE_DEVICES"
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
KUBERNETES = {
    "NUM_PROCESSES": "4",
    "JOB_COMPLETION_INDEX": "3",
    "JAX_COORDINATOR_ADDRESS": "job-0.job:55527",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets just these variables among those that a launcher would set."""

    def set_only(variables):
        for name in list(os.environ):
            is_ours = name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR"))
            if is_ours or name in (*KUBERNETES, GPUS):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_only({})
    return set_only


@pytest.mark.parametrize(
    ("variables", "config", "wanted"),
    [
        (SLURM, {"launcher": "slurm"}, (None, 8, 5, [1], "slurm")),
        (SLURM, {"launcher": "slurm", "gpus_per_process": 4}, (None, 8, 5, [4, 5, 6, 7], "slurm")),
        # srun --gpus-per-task shows a process its own alone.
        (SLURM | {GPUS: "3"}, {"launcher": "slurm"}, (None, 8, 5, [0], "slurm")),
        (SLURM | {GPUS: "0,1,2"}, {"launcher": "slurm"}, (None, 8, 5, [1], "slurm")),
        (SLURM | {GPUS: ""}, {"launcher": "slurm"}, (None, 8, 5, [1], "slurm")),
        (SLURM, {"launcher": "slurm", "coordinator": "a:1"}, ("a:1", 8, 5, [1], "deactivate")),
        (OPEN_MPI, {"launcher": "openmpi", "coordinator": "a:1"}, ("a:1", 8, 5, [1], "deactivate")),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:1"},
            {"launcher": "openmpi"},
            (None, 8, 5, [1], "ompi"),
        ),
        (KUBERNETES, {"launcher": "kubernetes"}, ("job-0.job:55527", 4, 3, None, "deactivate")),
        (
            {},
            {"launcher": "explicit", "coordinator": "[::1]:80", "number": 2, "index": 0},
            ("[::1]:80", 2, 0, None, "deactivate"),
        ),
    ],
)
def test_a_launcher_says_who_the_process_is(environment, variables, config, wanted):
    environment(variables)
    assert tuple(start_arguments(ProcessesConfig(**config)).values()) == wanted


@pytest.mark.parametrize(
    ("variables", "config", "message"),
    [
        (
            {},
            {"launcher": "slurm"},
            r"SLURM_JOB_ID: given None, expected a value, which launcher 'slurm' sets",
        ),
        (
            SLURM | {"SLURM_PROCID": "x"},
            {"launcher": "slurm"},
            "SLURM_PROCID: given 'x', expected a number",
        ),
        (
            SLURM | {"SLURM_PROCID": "8"},
            {"launcher": "slurm"},
            r"index: given 8, .* number of processes = 8",
        ),
        (
            OPEN_MPI,
            {"launcher": "openmpi"},
            r'coordinator: given None, expected "host:port" .* mpi4py',
        ),
        ({}, {"launcher": "mpi"}, r'coordinator: given None, expected "host:port" .* mpi4py'),
        (
            KUBERNETES | {"JAX_COORDINATOR_ADDRESS": "job:"},
            {"launcher": "kubernetes"},
            "ADDRESS: given 'job:'",
        ),
        ({}, {"launcher": "kubernetes"}, "environment variable NUM_PROCESSES: given None"),
        ({}, {"launcher": "explicit"}, r"processes.number: given None, expected a number"),
        (
            {},
            {"launcher": "explicit", "number": 2, "index": 1},
            r"coordinator: given None, .*JAX_COORDINATOR",
        ),
        ({}, {"launcher": "explicit", "number": 2, "index": -1}, "index: given -1"),
        ({}, {"launcher": "pbs"}, "launcher: given 'pbs', expected one of"),
        ({}, {"launcher": "explicit", "coordinator": "node1"}, "coordinator: given 'node1'"),
        ({}, {"launcher": "explicit", "gpus_per_process": 1}, "set CUDA_VISIBLE_DEVICES"),
        ({}, {"launcher": "explicit", "number": 0}, "number: given 0"),
    ],
)
def test_what_is_missing_or_out_of_range_is_named(
    environment, variables, config, message, monkeypatch
):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    environment(variables)
    with pytest.raises(InputError, match=message):
        start_arguments(ProcessesConfig(**config))


def test_the_manifest_gives_what_the_launcher_reads():
    text = (ROOT / "experiments" / "kubernetes_jobset.yaml").read_text()
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert variables.keys() | {"JOB_COMPLETION_INDEX"} >= KUBERNETES.keys()
    assert job["parallelism"] == job["completions"] == int(variables["NUM_PROCESSES"])
    assert job["completionMode"] == "Indexed"
    port = variables["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2]
    assert int(port) == container["ports"][0]["containerPort"]
    assert "--set=runtime.processes.launcher=kubernetes" in container["args"]


@pytest.mark.parametrize(
    ("status", "is_requeued"), [(0, False), (2, False), (75, True), (137, True)]
)
def test_the_slurm_script_tries_again_what_was_stuck(tmp_path, status, is_requeued):
    for name, text in {
        "srun": f"echo srun $@; exit {status}",
        "scontrol": "echo scontrol $@",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "2",
    }
    command = ["bash", ROOT / "experiments" / "slurm.sh", "run.gin", "--set", "train.steps=2"]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == status and not result.stderr
    first, *rest = result.stdout.splitlines()
    assert first.endswith(
        "jaxscale pretrain run.gin --set train.steps=2 --set runtime.processes.launcher=slurm"
    )
    assert rest == ["scontrol requeue 17"] * is_requeued


def test_every_launcher_is_described():
    assert all(f'"{name}"' in ProcessesConfig.__doc__ for name in LAUNCHERS)


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


START = """
import sys
from jaxscale.launch.processes import *
address, index = sys.argv[1], int(sys.argv[2])
start_processes(ProcessesConfig('explicit', address, 2, index, start_timeout_s=2), 10)
"""


def test_too_few_processes_or_no_coordinator_is_one_line_within_the_time():
    """As process 0 that nobody joins, and as process 1 without a process 0; both wait at once."""
    addresses = [free_address(), free_address()]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", START, address, str(index)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, address in enumerate(addresses)
    ]
    for index, (process, address) in enumerate(zip(started, addresses, strict=True)):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1, errors
        (line,) = errors.splitlines()
        who = f"jaxscale: process {index} of 2"
        assert line.startswith(f"{who} could not join the run (RuntimeConfig.processes: launcher")
        assert address in line and "after 2 s" in line


def test_a_port_that_is_taken_is_named():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        config = ProcessesConfig("explicit", f"localhost:{taken.getsockname()[1]}", 2, 0)
        with pytest.raises(
            InputError, match=r"port on which process 0 can listen \(Address already in use\)"
        ):
            start_processes(config, 10)


def test_a_process_that_has_used_jax_already_is_refused():
    jax.devices()
    message = r"could not join the run .* must be called before any JAX calls"
    with pytest.raises(RunError, match=message):
        start_processes(ProcessesConfig("explicit", free_address(), 2, 1), 10)


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    process_index: int
    id: int
    device_kind: str = "none"
    platform: str = "none"


def mesh_of(sizes, num_processes):
    number = int(np.prod(sizes))
    devices = np.empty(number, object)
    devices[:] = [Device(i * num_processes // number, i) for i in range(number)]
    return Mesh(devices.reshape(sizes), AXES)


@pytest.mark.parametrize(
    ("sizes", "num_processes", "shares"),
    [
        ((1, 8, 1, 1, 1), 2, [(0, 2), (1, 2)]),
        ((1, 2, 2, 1, 2), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # Each process is a pipeline stage: all read the whole batch.
        ((2, 4, 1, 1, 1), 2, [(0, 1), (0, 1)]),
        ((2, 4, 1, 1, 1), 4, [(0, 2), (1, 2), (0, 2), (1, 2)]),
        ((1, 1, 1, 8, 1), 2, [(0, 1), (0, 1)]),
        ((1, 2, 1, 2, 2), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_read_the_rows_their_devices_hold(monkeypatch, sizes, num_processes, shares):
    mesh = mesh_of(sizes, num_processes)
    for process, wanted in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        batch_share.cache_clear()
        assert batch_share(mesh) == wanted


def test_a_process_with_parts_of_shares_is_refused():
    with pytest.raises(
        InputError, match=r"data \* expert = 3 shares, process 0 holds parts of \[0, 1\]"
    ):
        batch_share(mesh_of((1, 3, 1, 4, 1), 2))
