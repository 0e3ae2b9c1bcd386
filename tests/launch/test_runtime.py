"""Settings of the process reach JAX before it starts, in a process of their own."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.types import InputError

PROGRAM = """
import os, sys, warnings
warnings.simplefilter("ignore")
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
apply_runtime({config}, sys.argv[1])
import jax
print(jax.device_count(), jax.devices()[0].platform, os.environ["XLA_FLAGS"])
"""


def started_with(config, directory):
    command = [sys.executable, "-c", PROGRAM.format(config=config), str(directory)]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(directory)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_platform_devices_and_flags(tmp_path):
    config = "RuntimeConfig(platform='cpu', num_cpu_devices=3, xla_flags=('--xla_cpu_enable_fast_math=false',))"
    assert started_with(config, tmp_path) == "3 cpu --xla_cpu_enable_fast_math=false\n"


SAVED = """
import os, sys
from jaxscale.launch.runtime import ProcessesConfig, RuntimeConfig, apply_runtime
processes = ProcessesConfig("explicit", sys.argv[1], 2, int(sys.argv[2]))
apply_runtime(RuntimeConfig(is_deterministic=True, processes=processes), sys.argv[3])
print(os.environ["XLA_FLAGS"])
"""


@pytest.mark.parametrize("holder", [0, 1])
def test_process_0_writes_the_autotuning_or_all_load_it(tmp_path, holder):
    """A folder for each stands for a shared one of which a process does not see the newest state."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    files = [tmp_path / str(index) / "autotune.txtpb" for index in range(2)]
    for file in files:
        file.parent.mkdir()
        file.write_text("saved" if file == files[holder] else "")
    command = [sys.executable, "-c", SAVED, address]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [*command, str(index), file.parent], env=environment, stdout=subprocess.PIPE, text=True
        )
        for index, file in enumerate(files)
    ]
    flags = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(each.pop(0) == "--xla_gpu_deterministic_ops=true" for each in flags)
    if holder == 0:
        assert flags == [[f"--xla_gpu_load_autotune_results_from={file}"] for file in files]
    else:
        assert flags == [[f"--xla_gpu_dump_autotune_results_to={files[0]}"], []]


def test_the_devices_that_are_there_already_may_be_asked_for(tmp_path):
    apply_runtime(RuntimeConfig(platform="cpu", num_cpu_devices=8), str(tmp_path))
    with pytest.raises(InputError, match=r"num_cpu_devices: given 3, expected 8"):
        apply_runtime(RuntimeConfig(num_cpu_devices=3), str(tmp_path))


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
