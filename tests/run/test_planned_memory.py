"""A long pipeline's memory from a short one is that of the whole program."""

import pytest

from jaxscale.launch.ahead_of_time import described_devices, has_plugin, memory_of
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.job import Layout
from jaxscale.run.compile import lower_step
from jaxscale.run.planned import planned
from jaxscale.run.planned_memory import CompiledMemory
from jaxscale.run.run import load_run
from tests.run.runs import ROOT

SMALL = "model.num_layers=8 model.model_dim=256 model.vocab_size=1024 data.batch_size=64"


@pytest.mark.long
@pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
@pytest.mark.parametrize(("schedule", "chunks"), [("zero_bubble", 1), ("interleaved", 2)])
def test_the_memory_of_a_long_pipeline_is_that_of_its_whole_program(schedule, chunks):
    file = ROOT / "experiments" / "configs" / "runs" / "llama_1b.gin"
    run = load_run([file], [*SMALL.split(), "data.sequence_length=1024"])
    apply_runtime(RuntimeConfig(platform="cpu"), ".")
    mesh = MeshConfig(pipeline=4, schedule=schedule, num_chunks=chunks)
    layout = Layout(mesh, 16, "none", False)
    (found,) = CompiledMemory(run, Cluster.parse("h200:1x4"))([layout])
    devices = described_devices("h200", num_hosts=1, gpus_per_host=4)
    whole = memory_of(lower_step(planned(run, layout), devices).compile()).peak
    assert found == pytest.approx(whole, rel=0.02)
