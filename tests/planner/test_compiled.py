"""No plan runs out of memory: the best of ten configurations, compiled for H200s."""

import pytest

from jaxscale.launch.ahead_of_time import described_devices, has_plugin, memory_of
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.planner.cluster import Cluster
from jaxscale.run.compile import lower_step
from jaxscale.run.planned import job_of, planned, search
from jaxscale.run.run import load_run
from tests.run.runs import ROOT

CONFIGS = ROOT / "experiments" / "configs" / "runs"
SHARE = 0.75
# Model, layers, tokens a row, rows a device, devices.
CASES = [
    ("llama_1b", 4, 4096, 4, "h200:1x1"),
    ("llama_1b", 4, 4096, 32, "h200:1x1"),
    ("llama_1b", 4, 32768, 4, "h200:1x2"),
    ("llama_1b", 8, 8192, 16, "h200:1x8"),
    ("llama_1b", 64, 4096, 8, "h200:1x2"),
    ("mixtral_4b", 4, 4096, 4, "h200:1x1"),
    ("mixtral_4b", 4, 4096, 32, "h200:1x1"),
    ("mixtral_4b", 4, 16384, 8, "h200:1x4"),
    ("mixtral_4b", 8, 4096, 16, "h200:1x8"),
    ("mixtral_4b", 32, 4096, 8, "h200:1x4"),
]


@pytest.mark.long
@pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_best_plan_fits_when_it_is_compiled(case):
    name, num_layers, length, rows, devices = case
    cluster = Cluster.parse(devices)
    overrides = (
        f"model.num_layers={num_layers}",
        f"model.max_length={length}",
        f"data.sequence_length={length}",
        f"data.batch_size={rows * cluster.num_devices}",
    )
    run = load_run([CONFIGS / f"{name}.gin"], overrides)
    apply_runtime(RuntimeConfig(platform="cpu"), ".")
    best = search(job_of(run), cluster, {}, SHARE).ranked[0]
    on = described_devices("h200", num_hosts=1, gpus_per_host=cluster.devices_per_host)
    memory = memory_of(lower_step(planned(run, best.layout), on).compile())
    assert memory.peak <= SHARE * cluster.device.memory_bytes, best
