"""Settings of the process reach JAX before it starts, in a process of their own."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from jaxscale.launch import runtime
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.types import InputError

PROGRAM = """
import os, sys, warnings
warnings.simplefilter("ignore")
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
apply_runtime({config}, sys.argv[1])
import jax
print(jax.device_count(), jax.devices()[0].platform, os.environ["XLA_FLAGS"])
print(int(os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]) > 0)
"""


def started_with(config, directory):
    command = [sys.executable, "-c", PROGRAM.format(config=config), str(directory)]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(directory)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_platform_devices_and_flags(tmp_path):
    flag = "--xla_cpu_enable_fast_math=false"
    config = f"RuntimeConfig(platform='cpu', num_cpu_devices=3, xla_flags=('{flag}',))"
    assert started_with(config, tmp_path) == f"3 cpu {flag}\nTrue\n"


SAVED = """
import os, sys
from jaxscale.launch.runtime import ProcessesConfig, RuntimeConfig, apply_runtime
processes = ProcessesConfig("explicit", sys.argv[1], 2, int(sys.argv[2]))
apply_runtime(RuntimeConfig(is_deterministic=True, processes=processes), sys.argv[3])
print(os.environ["XLA_FLAGS"])
"""


def saved_autotuning(directory, text):
    """The file of a run's directory, where a shared one is not seen alike by all processes."""
    directory.mkdir()
    file = directory / "autotune.txtpb"
    file.write_text(text)
    return file


def test_all_load_the_autotuning_that_process_0_has(tmp_path):
    """Two processes; the other does not see what is saved."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    files = [saved_autotuning(tmp_path / "0", "saved"), saved_autotuning(tmp_path / "1", "")]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAVED, address, str(index), file.parent],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index, file in enumerate(files)
    ]
    flags = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert flags == [
        ["--xla_gpu_deterministic_ops=true", f"--xla_gpu_load_autotune_results_from={file}"]
        for file in files
    ]


@pytest.mark.parametrize("index", [0, 1])
def test_process_0_alone_saves_the_autotuning_that_it_does_not_have(tmp_path, monkeypatch, index):
    """Even where another process sees a file."""
    file = saved_autotuning(tmp_path / "run", "" if index == 0 else "saved")
    said = {"autotune": "dump"}
    monkeypatch.setattr(runtime, "process_index", lambda: index)
    monkeypatch.setattr(runtime, "first_process_says", lambda name, value: said[name])
    wanted = (f"--xla_gpu_dump_autotune_results_to={file}",) if index == 0 else ()
    assert runtime._autotune_flags(str(file.parent)) == wanted


def test_process_0_says_what_it_sees(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        runtime, "first_process_says", lambda name, value: said.append(value) or value
    )
    for name, text in (("empty", ""), ("full", "saved")):
        runtime._autotune_flags(str(saved_autotuning(tmp_path / name, text).parent))
    runtime._autotune_flags(str(tmp_path / "none"))
    assert said == ["dump", "load", "dump"]


def test_the_devices_that_are_there_already_may_be_asked_for(tmp_path):
    apply_runtime(RuntimeConfig(platform="cpu", num_cpu_devices=8), str(tmp_path))
    with pytest.raises(InputError, match=r"num_cpu_devices: given 3, expected 8"):
        apply_runtime(RuntimeConfig(num_cpu_devices=3), str(tmp_path))


def test_a_flag_that_xla_does_not_know_is_refused_by_its_name(tmp_path):
    """XLA itself would end the process."""
    program = PROGRAM.format(config="RuntimeConfig(xla_flags=('--xla_nonsense=1',))")
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    expected = "RuntimeConfig.xla_flags: given ['--xla_nonsense=1'], expected flags of this XLA"
    assert expected in result.stderr


def test_flags_that_come_too_late_are_refused(tmp_path, monkeypatch):
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1 --xla_two=2")
    apply_runtime(RuntimeConfig(xla_flags=("--xla_two=2",)), str(tmp_path))
    with pytest.raises(
        InputError, match=r"RuntimeConfig.xla_flags: .* this one has started, without --xla_three=3"
    ):
        apply_runtime(RuntimeConfig(xla_flags=("--xla_two=2", "--xla_three=3")), str(tmp_path))
    with pytest.raises(
        InputError, match=r"RuntimeConfig.is_deterministic: .* --xla_gpu_deterministic_ops=true"
    ):
        apply_runtime(RuntimeConfig(is_deterministic=True), str(tmp_path))
    assert os.environ["XLA_FLAGS"] == "--xla_one=1 --xla_two=2"


def test_a_platform_that_comes_too_late_is_refused(tmp_path, monkeypatch):
    jax.devices()
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    with pytest.raises(
        InputError,
        match=r"RuntimeConfig.platform: given 'tpu', expected 'cpu', as this process has",
    ):
        apply_runtime(RuntimeConfig(platform="tpu"), str(tmp_path))


def test_a_platform_that_is_not_here_is_refused(tmp_path):
    command = [
        sys.executable,
        "-c",
        PROGRAM.format(config="RuntimeConfig(platform='cuda')"),
        str(tmp_path),
    ]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (
        "InputError: RuntimeConfig.platform: given 'cuda', expected a platform that this machine"
        in result.stderr
    )


def test_a_platform_that_does_not_exist_is_refused():
    with pytest.raises(
        InputError,
        match=r"RuntimeConfig.platform: given 'gpu', expected one of None, 'cpu', 'cuda'",
    ):
        RuntimeConfig(platform="gpu")
