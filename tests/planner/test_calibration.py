"""What devices here reach replaces the shares of the table."""

import dataclasses
import itertools

import jax
import pytest

from jaxscale.planner import calibration, timing
from jaxscale.planner.calibration import measured
from jaxscale.planner.cluster import DEVICES


def test_shares_are_what_is_measured_here():
    device = DEVICES["h200"]
    found = measured(device, jax.devices()[:2], shrink=64)
    changed = {
        field.name
        for field in dataclasses.fields(device)
        if getattr(found, field.name) != getattr(device, field.name)
    }
    assert changed == {
        f"{name}_share" for name in ("matmul", "attention", "expert", "memory", "link")
    }
    assert 0 < found.matmul_share < 0.01  # a CPU is no H200
    assert found.attention_share / found.matmul_share == pytest.approx(
        device.attention_share / device.matmul_share
    )


def test_one_device_has_no_links_to_measure():
    device = DEVICES["h200"]
    assert measured(device, jax.devices()[:1], shrink=64).link_share == device.link_share


def test_the_matmul_rate_is_that_of_a_timed_matmul(monkeypatch):
    """By a clock that ticks once at each look: the calls of a round take a tick."""
    tick_s = 0.5
    monkeypatch.setattr(timing.time, "perf_counter", itertools.count(step=tick_s).__next__)
    device, width = DEVICES["h200"], 8192 // 64
    flops = calibration.MATMUL_IN_STEP * timing.NUM_CALLS * 2 * width**3
    found = measured(device, jax.devices()[:1], shrink=64)
    assert found.matmul_share * device.matmul_flops == pytest.approx(flops / tick_s)
