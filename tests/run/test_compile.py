"""`compile` builds a run's step for GPUs that are not here, reads no data, says whether it fits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxscale import cli, config
from jaxscale.launch import ahead_of_time
from jaxscale.ops.device import name_kernels
from jaxscale.run.compile import Topology, check_fits
from jaxscale.run.inspect import bytes_per_device
from jaxscale.run.pretrain import pretrain
from jaxscale.types import InputError, RunError

needs_plugin = pytest.mark.skipif(
    not ahead_of_time.has_plugin(), reason="jax-cuda13-plugin is not installed"
)
TINY = Path(__file__).resolve().parents[1] / "tiny.gin"
COUNTERS = 4 + 8 + 1  # step, key and is_finite of the state
GIB = 2**30


@pytest.fixture
def file(tmp_path):
    """The tiny run over a corpus that does not exist."""
    path = tmp_path / "run.gin"
    path.write_text(
        f"include '{TINY}'\nCORPUS = ('{tmp_path}/none',)\nCACHE = 'none'\n"
        f"DIRECTORY = '{tmp_path}/run'\n"
    )
    return path


def compile_file(file, *overrides, topology="h200:1x8"):
    arguments = ["compile", str(file), "--topology", topology]
    try:
        return cli.main(arguments + [f"--set={each}" for each in overrides])
    finally:
        name_kernels(None)


def sizes(shown):
    return {
        name: int(size.replace(",", ""))
        for name, size in re.findall(r"^  (\w.*?)  +[\d.]+ GiB +([\d,]+)$", shown, re.M)
    }


@needs_plugin
def test_bytes_are_those_of_inspect_and_nothing_is_left_behind(file, tmp_path, capsys):
    """The compiler's arguments are what `inspect` computes, the batch and three scalars."""
    live = {id(array) for array in jax.live_arrays()}
    assert compile_file(file, "mesh.zero=3") == 0
    assert {id(array) for array in jax.live_arrays()} <= live
    assert [path.name for path in tmp_path.iterdir()] == ["run.gin"]
    shown = capsys.readouterr().out
    assert shown.startswith("h200:1x8: 8 x NVIDIA H200\n")
    run = config.load(pretrain, [file], ["mesh.zero=3"]).arguments["run"]
    told = bytes_per_device(run, run.table(), run.setup().region.specs)
    found = sizes(shown)
    assert found["parameters"] == told["parameters"]
    assert found["optimizer state"] == told["optimizer"]
    assert found["batch"] == 5 * 4 * 8 * 32 // 4
    assert (
        found["arguments, all"]
        == found["parameters"] + found["optimizer state"] + found["batch"] + COUNTERS
    )
    assert found["peak"] == found["arguments, all"] + found["outputs, new"] + found["temporaries"]
    assert re.search(r"^  reduce-scatter +\d+ +[1-9]", shown, re.MULTILINE)
    assert "\nfits: 0.00 GiB needed; JAX takes 0.75 of 139.80 GiB = 104.85 GiB\n" in shown


@pytest.mark.long
@needs_plugin
def test_what_does_not_fit_exits_1(file, capsys):
    """Here a deterministic run, with rows that are one document each.

    Their batches have no segments.
    """
    overrides = f"model.vocab_size={10**9}", "data.is_packed=False", "runtime.is_deterministic=True"
    assert compile_file(file, *overrides) == 1
    captured = capsys.readouterr()
    assert sizes(captured.out)["batch"] == 4 * 4 * 8 * 32 // 4
    assert (
        sizes(captured.out)["peak"] > 3 * 4 * 10**9 * 16 // 2
    )  # float32 and AdamW's two, the table cut in two
    assert re.search(
        r"compile: does not fit: [\d.]+ GiB needed; JAX takes 0.75 of 139.80 GiB", captured.err
    )


@needs_plugin
@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            "INTERNAL: no such luck",
            "the compiler failed, maybe for want of a GPU: INTERNAL: no such",
        ),
        ("RESOURCE_EXHAUSTED: of HBM", "does not fit: RESOURCE_EXHAUSTED: of HBM"),
    ],
)
def test_a_compiler_that_fails_exits_1(file, capsys, monkeypatch, reason, message):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(f"{reason}\nand more")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    assert compile_file(file) == 1
    error = capsys.readouterr().err
    assert message in error and error.endswith(f"{reason}\n")


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        (
            "h200",
            "topology: given 'h200', expected MACHINE:HOSTSxGPUS_PER_HOST, such as \"h200:16x8\"",
        ),
        ("h200:0x8", "num_hosts: given 0, expected a number above 0"),
        ("h300:1x8", "machine: given 'h300', expected one of 'a100', 'b200', 'h200'"),
        pytest.param(
            "h200:2x8",
            "1 * 4 * 1 * 1 * 2 = 8 to equal the number of devices, 16",
            marks=needs_plugin,
        ),
    ],
)
def test_a_topology_that_is_wrong_exits_2(file, capsys, topology, message):
    assert compile_file(file, topology=topology) == 2
    assert message in capsys.readouterr().err


@needs_plugin
@pytest.mark.parametrize("kernels", ["triton", "mosaic"])
def test_kernels_that_were_named_for_float32_exit_2(file, capsys, kernels):
    """The tiny run computes in it."""
    assert compile_file(file, f"runtime.kernels='{kernels}'") == 2
    message = (
        f"RuntimeConfig.kernels: given '{kernels}', expected 'xla' or None with Policy.compute"
    )
    assert f"{message} = 'float32'" in capsys.readouterr().err


@needs_plugin
def test_kernels_that_were_named_and_another_gpu_lacks_exit_2(file, capsys):
    overrides = "runtime.kernels='mosaic'", "policy.compute='bfloat16'"
    assert compile_file(file, *overrides, topology="a100:1x8") == 2
    expected = "a Hopper GPU, of compute capability 9.0, but this is a GPU of compute capability"
    assert f"expected {expected} 8.0" in capsys.readouterr().err


def test_without_the_compiler_the_extra_is_named(file, capsys, monkeypatch):
    monkeypatch.setattr(ahead_of_time, "has_plugin", lambda: False)
    assert compile_file(file) == 2
    assert "pip install 'jaxscale[compile]'" in capsys.readouterr().err


def test_the_share_that_would_do_is_named():
    assert (
        check_fits(70 * GIB, 100 * GIB, 0.75)
        == "fits: 70.00 GiB needed; JAX takes 0.75 of 100.00 GiB = 75.00 GiB"
    )
    with pytest.raises(
        RunError,
        match=r"does not fit: 80.00 GiB needed.*; XLA_PYTHON_CLIENT_MEM_FRACTION=0.80 would",
    ):
        check_fits(80 * GIB, 100 * GIB, 0.75)
    with pytest.raises(RunError, match=r"75.00 GiB$"):
        check_fits(96 * GIB, 100 * GIB, 0.75)


def test_of_a_tpus_memory_jax_takes_all(monkeypatch):
    """The variable that says otherwise is one for GPUs."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert Topology.parse("v5e:2x4").share() == 1
    assert Topology.parse("a100:1x4").share() == 0.75


def test_a_share_that_is_no_number_is_named(file, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    assert compile_file(file) == 2
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION: given 'most'" in capsys.readouterr().err


def test_topologies_are_hosts_by_gpus():
    assert Topology.parse("h200:16x8") == Topology("h200", (16, 8))
    with pytest.raises(InputError, match="topology"):
        Topology.parse("h200:16x8x1")


MIXTURE = "mixtral_4b.gin", "mesh.expert=2", "mesh.tensor=2"
DENSE = "llama_1b.gin", "mesh.data=2", "mesh.sequence=2", "mesh.zero=3", "data.batch_size=2"


@pytest.mark.long
@pytest.mark.processes
@needs_plugin
@pytest.mark.parametrize(
    ("machine", "run"),
    [("a100", MIXTURE), ("b200", MIXTURE), ("a100", DENSE), ("b200", DENSE)],
    ids=["a100_mixture", "b200_mixture", "a100_dense", "b200_dense"],
)
def test_other_gpus_get_triton_kernels(machine, run):
    """In a process of its own: where Triton interprets, as in tests/kernels, it cannot compile."""
    name, *overrides = run
    file = Path(__file__).parents[2] / "experiments/configs/runs" / name
    overrides += "model.num_layers=1", "data.sequence_length=512", "data.is_packed=True"
    command = [sys.executable, "-m", "jaxscale", "compile", file, "--topology", f"{machine}:1x4"]
    command += [f"--set={each}" for each in overrides]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\nfits: " in done.stdout
    operations = {"attention", "norm", "cross-entropy"} | ({"experts"} if run is MIXTURE else set())
    chosen = set(re.findall(r"^([\w-]+): backend (\w+)", done.stderr, re.MULTILINE))
    assert chosen == {(operation, "triton") for operation in operations}
