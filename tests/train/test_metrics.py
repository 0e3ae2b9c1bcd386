"""The history survives kills and resumes; figures of speed."""

import json
import math
import types

import jax
import numpy as np
import pytest

from jaxscale.train import metrics
from jaxscale.train.metrics import (
    History,
    Speed,
    expert_use,
    peak_flops,
    read_history,
)


def write(path, steps, first=0):
    history = History(path, first)
    for step in steps:
        history.report(step, {"loss": 1 / step})
    history.close()


def steps_of(path):
    return [line["step"] for line in read_history(path)]


def test_floats_read_back_bit_identical(tmp_path):
    values = [float(np.float32(x)) for x in (0.1, 1 / 3, 1e-38, 3.4e38, math.pi)]
    history = History(tmp_path / "metrics.jsonl", 0)
    history.report(1, {str(i): value for i, value in enumerate(values)})
    history.close()
    (line,) = read_history(tmp_path / "metrics.jsonl")
    assert [line[str(i)] for i in range(len(values))] == values


def test_arrays_of_any_kind_are_written(tmp_path):
    """Evaluators return what they like."""
    history = History(tmp_path / "metrics.jsonl", 0)
    history.report(
        1, {"load": np.float32([[1, 2]]), "a": np.float32(0.5), "b": jax.numpy.int32(3), "c": True}
    )
    history.close()
    assert read_history(tmp_path / "metrics.jsonl") == [
        {"step": 1, "load": [[1, 2]], "a": 0.5, "b": 3, "c": True}
    ]


def test_what_is_no_finite_number_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path, 0)
    odd = {"loss": math.nan, "norms": np.float32([1, np.inf]), "a/b": {"c": [-math.inf, "NaN"]}}
    history.report(1, odd)
    history.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "norms": [1, None], "a/b": {"c": [None, "NaN"]}}


def test_a_resumed_history_drops_the_steps_that_run_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(6, 9), first=5)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    write(path, [1], first=0)
    assert steps_of(path) == [1]


def test_a_line_cut_short_by_a_kill_is_left_out_and_then_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    path.write_text(path.read_text()[:-9])
    assert steps_of(path) == [1, 2]
    write(path, [3, 4], first=3)
    assert steps_of(path) == [1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_lines_that_are_not_of_a_history_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('[1]\n3\n{"loss": 1}\n{"step": 2}\n')
    assert steps_of(path) == [2]


def test_no_history_reads_as_none(tmp_path):
    assert read_history(tmp_path / "absent.jsonl") == []


def test_a_reader_sees_every_reported_step_at_once(tmp_path):
    history = History(tmp_path / "metrics.jsonl", 0)
    history.report(1, {"loss": 2.0})
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    history.close()


def test_speed_and_mfu(monkeypatch):
    """1,000 tokens of 989e9 FLOPs in half a second on two H200 are 989 TFLOP/s a device.

    The whole peak.
    """
    memory = {"peak_bytes_in_use": 5}
    device = types.SimpleNamespace(device_kind="NVIDIA H200", memory_stats=lambda: memory)
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [device])
    monkeypatch.setattr(metrics.jax, "device_count", lambda: 2)
    clock = iter([10.0, 10.5])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    speed = Speed(tokens_per_step=1000, flops_per_token=989e9, _last=metrics.time.perf_counter())
    assert speed.figures() == pytest.approx(
        dict(
            seconds=0.5, tokens_per_second=2000, tflops_per_device=989, mfu=1.0, peak_memory_bytes=5
        )
    )


def test_the_use_of_experts_is_that_of_the_least_even_layer():
    assert expert_use(np.array([[2, 2, 2, 2], [4, 4, 0, 0]])) == pytest.approx(
        dict(expert_max_share=0.5, expert_entropy=0.5)
    )
    assert expert_use(np.array([[0, 8]])) == dict(expert_max_share=1.0, expert_entropy=0.0)
    assert expert_use(np.zeros((1, 4))) == dict(
        expert_max_share=0.0, expert_entropy=0.0
    )  # no valid token


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("NVIDIA H100 80GB HBM4", None),
        ("NVIDIA B300", None),
    ],
)
def test_a_peak_is_that_of_the_whole_name(kind, peak, monkeypatch):
    device = types.SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert peak_flops() == peak


def test_no_mfu_where_the_peak_is_not_known():
    assert peak_flops() is None
    assert "mfu" not in Speed(1, 1.0).figures()
