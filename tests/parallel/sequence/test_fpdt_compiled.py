"""Layers in chunks as XLA compiles them for H200s: what is beside exchanges, and memory."""

import re
import subprocess
import sys

import jax
import pytest

from jaxscale.launch.ahead_of_time import has_plugin
from tests.run.runs import ROOT

SCRIPT = ROOT / "experiments/bench/compiled_exchanges.py"
FILE = ROOT / "experiments/configs/papers/fpdt_8b.gin"
COMMON = (
    "model.num_layers=1",
    "mesh.is_optimizer_on_host=False",
    "execution.is_scanned=False",
    "execution.num_loss_chunks=64",
    "execution.strategy.chunks=device",
    "data.sequence_length=524288",
)
CASES = {
    # Of what is exchanged 64 % are hidden, and 16 % were.
    "attention twice": (2, ["chunk_tokens=131072"], 0.55, 23.5),
    "outputs on the host": (2, ["chunk_tokens=65536", "attention='host'"], 0.6, 18),
    "many chunks": (1, ["chunk_tokens=32768"], 0, 30),
}


@pytest.mark.long
@pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="attention's kernel needs jax 0.11")
@pytest.mark.parametrize("case", CASES)
def test_exchanges_are_hidden_and_no_chunk_waits_for_memory_of_all(case):
    num_gpus, settings, least_hidden, most_gib = CASES[case]
    overrides = [*COMMON, f"mesh.sequence={num_gpus}"]
    overrides += [f"execution.strategy.{setting}" for setting in settings]
    words = [sys.executable, SCRIPT, FILE, "--gpus", str(num_gpus)]
    for override in overrides:
        words += ["--set", override]
    shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    exchanged = re.search(r"\| all-to-all \| ([\d.]+) \| ([\d.]+) \|", shown)
    assert bool(exchanged) == (num_gpus > 1)
    if exchanged:
        whole, hidden = map(float, exchanged.groups())
        assert hidden >= least_hidden * whole
    assert float(re.search(r"temporaries ([\d.]+) GiB", shown)[1]) <= most_gib
