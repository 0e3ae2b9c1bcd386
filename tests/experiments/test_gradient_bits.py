"""What the bench of the gradient's bits tells of runs that differ."""

import importlib
import math
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "experiments/bench"


@pytest.fixture
def bits(monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module("gradient_bits")
    for name in ("gradient_bits", "gin_run"):
        sys.modules.pop(name)


def gradient(dtype="float32", **changes):
    """Of three layers."""
    layers = {"q": np.ones((3, 4)), "up": np.ones((3, 5))} | changes
    layers = {name: jnp.asarray(array, dtype) for name, array in layers.items()}
    return {"layers": {"0": layers}, "head": jnp.ones(6, dtype)}


def test_the_last_layer_that_differs_in_any_run_is_told(bits, monkeypatch):
    of_first, of_second = np.ones((3, 4)), np.ones((3, 4))
    of_first[0, 1] += 2**-23
    of_second[1] = 3
    runs = [(1.0, gradient()), (1.0, gradient(q=of_first)), (1.5, gradient(q=of_second))]
    monkeypatch.setattr(bits, "runs_of", lambda run, num_runs: iter(runs))
    line, first = bits.compared(None, 3)
    place = "layers/0/q", 1
    told = {"last_layer": dict([place]), "largest": 2.0, "of": place}
    assert line == {"loss": 1.0, "other_losses": 1} | told
    line = bits.told(bits.differences(runs[1][1], first))
    place = "layers/0/q", 0
    assert line == {"last_layer": dict([place]), "largest": pytest.approx(2**-24), "of": place}
    told = bits.told(bits.differences(first, first))
    assert told == {"last_layer": {}, "largest": 0.0, "of": None}


def test_what_is_not_a_number_differs_most_and_zeros_have_signs(bits):
    up = np.ones((3, 5))
    up[2, 1] = math.nan
    nan, zeros = gradient("bfloat16", up=up), gradient("bfloat16", up=0 * np.ones((3, 5)))
    assert bits.differences(nan, gradient("bfloat16")) == {("layers/0/up", 2): math.inf}
    assert not bits.differences(nan, nan)
    negative = gradient("bfloat16", up=-0.0 * np.ones((3, 5)))
    assert len(bits.differences(negative, zeros)) == 3
