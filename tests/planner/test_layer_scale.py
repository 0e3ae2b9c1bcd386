"""Measured layers take in a plan as long as they took, and each distinct one runs once."""

import dataclasses
import itertools

import jax
import pytest

from jaxscale.models.config import NormConfig
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.planner import timing
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.job import Layout
from jaxscale.planner.layer_scale import MeasuredLayers, share_of_layer
from jaxscale.planner.layer_time import LayerClock
from jaxscale.planner.search import Planner
from jaxscale.planner.timing import BlockTimes
from jaxscale.run.planned import job_of
from tests.run.runs import load_run, write_run

FORWARD_S, BOTH_S = 1.0, 4.0


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    run = load_run(write_run(folder), folder, "data.batch_size=8")
    return job_of(run)


def measuring(job):
    cluster, times = Cluster.parse("h200:1x2"), BlockTimes(jax.devices()[0])
    clock = LayerClock(job, cluster)
    return Planner(job, cluster, 1e12, MeasuredLayers(job, times, clock)), times


def test_what_a_device_computes_takes_as_long_as_it_was_measured(job, monkeypatch):
    """A clock that says 1 s for each forward and 4 s with the backward, whatever runs."""
    seconds = itertools.cycle([FORWARD_S, BOTH_S])
    monkeypatch.setattr(timing, "median_s", lambda function, *values: next(seconds))
    planner, times = measuring(job)
    one = planner.estimate(Layout(MeshConfig(zero=0), 2, "none", False))
    computed = sum(one.time.parts[name] for name in ("matmul", "attention", "memory"))
    num_layers = job.model.num_layers
    assert computed == pytest.approx(2 * (num_layers + 1) * BOTH_S)
    assert times.num_measured == 2  # a layer and a head
    # Two devices with half of the rows each have the same micro-batches.
    spread = planner.estimate(Layout(MeshConfig(data=2, zero=0), 1, "none", False))
    assert times.num_measured == 2 and times.num_blocks == 2
    assert spread.time.total == pytest.approx(one.time.total / 2, rel=1e-3)


def test_a_layer_runs_forward_and_backward(job):
    planner, times = measuring(job)
    found = planner.estimate(Layout(MeshConfig(zero=0), 1, "full", True))
    assert 0 < found.time.total < 60 and times.num_measured == 2


def test_a_share_of_a_layer_has_a_share_of_the_matmuls(job):
    (layer,) = job.model.pattern
    half = share_of_layer(layer, 2)
    assert half.feed_forward.dim == layer.feed_forward.dim // 2
    assert half.attention.num_heads == layer.attention.num_heads // 2


def test_layer_norms_are_read_again_in_the_backward(job):
    """Their input three times and its norm's gradient once, as there is no kernel for them."""
    cluster = Cluster.parse("h200:1x1")
    layer_norms = dataclasses.replace(job.model, norm=NormConfig("layernorm"))
    layout, others = (
        Layout(MeshConfig(), 1, "none", False),
        dataclasses.replace(job, model=layer_norms),
    )
    rms, layer = (
        Planner(each, cluster, 1e12).estimate(layout).time.parts["memory"] for each in (job, others)
    )
    num_norms = 2 * job.model.num_layers
    num_bytes = 4 * num_norms * layout.tokens(job) * job.model.model_dim * job.width
    assert layer - rms == pytest.approx(num_bytes / LayerClock(job, cluster).memory_bandwidth)
