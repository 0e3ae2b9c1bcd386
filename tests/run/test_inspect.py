"""`inspect` tells what a run would be from shapes alone, for a mesh larger than this machine."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxscale import cli
from jaxscale.models.config.facts import from_flat
from jaxscale.models.parameters import count_parameters, parameter_table

ROOT = Path(__file__).resolve().parents[2]
FILE = "experiments/configs/runs/llama_1b.gin"
ATTENTION, FEED_FORWARD, TABLE = 2048 * 128 * (16 + 8 + 8 + 16), 3 * 2048 * 8192, 32064 * 2048
TOTAL = 2 * TABLE + 2048 + 16 * (ATTENTION + FEED_FORWARD + 2 * 2048)


def inspect(*overrides, capsys):
    assert cli.main(["inspect", str(ROOT / FILE), *(f"--set={each}" for each in overrides)]) == 0
    return capsys.readouterr().out


def test_counts_table_and_bytes(capsys):
    """Float32 parameters, as much again for the gradients and twice as much for AdamW."""
    shown = inspect(capsys=capsys)
    assert "ModelConfig.num_layers = 16" in shown
    assert f"{TOTAL:,} total" in shown
    for name, times in {"parameters": 1, "gradients": 1, "optimizer": 2, "sum": 4}.items():
        assert re.search(
            rf"^{name} +{times * TOTAL * 4 / 2**30:.2f} GiB per device$", shown, re.MULTILINE
        ), name
    assert re.search(r"^layers/0/attention/q +LDNH +\(16, 2048, 16, 128\) ", shown, re.MULTILINE)


def test_activations_and_the_devices_that_a_step_fits(capsys, monkeypatch):
    """On an H200 this step needs 38.1 GiB (experiments/results/2026-11-23_h200_train_step.md)."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    sizes = {}
    for rows in (4, 12):
        shown = inspect(f"data.batch_size={rows}", capsys=capsys)
        for name in ("activations", "a step"):
            found = re.search(
                rf"^{name} +([\d.]+) GiB per device.* estimated$", shown, re.MULTILINE
            )
            sizes[name, rows] = float(found[1])
        verdicts = re.search(r"^fits +(.*)$", shown, re.MULTILINE)[1]
        assert ("h100: yes, 59.74 GiB" in verdicts, "h200: yes" in verdicts) == (rows == 4, True)
        assert "v100_32gb: no" in verdicts and "0.75 of the memory" in verdicts
    assert sizes["a step", 4] == pytest.approx(38.1, rel=0.03)
    assert sizes["activations", 12] > 2.5 * sizes["activations", 4]


def test_a_step_on_virtual_devices_is_compared_with_the_machine(capsys, monkeypatch):
    monkeypatch.setattr("jaxscale.run.inspect.host_bytes", lambda: 300 << 30)
    for devices, verdict in ((4, "yes"), (16, "no")):
        mesh = f"mesh.data={devices}", f"data.batch_size={4 * devices}"
        shown = inspect("runtime.platform=cpu", *mesh, capsys=capsys)
        assert f"fits          this machine: {verdict}, 300.00 GiB" in shown


def test_a_mesh_that_is_not_there(capsys):
    """ZeRO 3 over 64 and tensor 4 on 256 devices divide everything but a few norms by 256.

    Here there are 8.
    """
    shown = inspect(
        "mesh.data=64", "mesh.tensor=4", "mesh.zero=3", "data.batch_size=64", capsys=capsys
    )
    assert "256 devices" in shown and re.search(
        r"attention/q .*\(pipeline, data, tensor, -\)", shown
    )
    size = float(re.search(r"^sum +([\d.]+) MiB per device$", shown, re.MULTILINE)[1])
    assert size == pytest.approx(4 * TOTAL * 4 / 2**20 / 256, rel=1e-3)


def test_nothing_is_allocated(capsys):
    before = {id(array) for array in jax.live_arrays()}
    inspect("optimizer.name='muon'", capsys=capsys)
    assert {id(array) for array in jax.live_arrays()} <= before


def test_no_device_is_asked_for():
    """Not even one: inspect works where the accelerator is taken or absent."""
    program = (
        "import jaxscale.cli\n"
        f"assert jaxscale.cli.main(['inspect', {FILE!r}]) == 0\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr


def test_a_misfit_is_refused(capsys):
    arguments = ["inspect", str(ROOT / FILE), "--set=data.sequence_length=8192"]
    assert cli.main(arguments) == 2
    assert "sequence_length <= max_length" in capsys.readouterr().err


def test_active_parameters_of_experts():
    """Two of eight experts count, the look-up table does not, the tied unembedding does."""
    dims = dict(
        vocab_size=100,
        num_layers=3,
        model_dim=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        ffn_dim=32,
    )
    experts = dict(moe_pattern=(True,), num_experts=8, num_active_experts=2, expert_dim=24)
    model = from_flat(**dims, **experts, max_length=8)
    total, active = count_parameters(parameter_table(model))
    attention, norms, expert, router = 16 * 4 * (4 + 2 + 2 + 4), 2 * 16, 3 * 16 * 24, 16 * 8
    assert total == 2 * 100 * 16 + 16 + 3 * (attention + norms + 8 * expert + router)
    assert active == 100 * 16 + 16 + 3 * (attention + norms + 2 * expert + router)
    tied = dataclasses.replace(model, is_tied=True)
    assert count_parameters(parameter_table(tied))[1] == active
