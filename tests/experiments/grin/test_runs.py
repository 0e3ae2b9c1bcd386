"""Runs of two arms: compared seed by seed, tabled and drawn."""

import json

import numpy as np
import pytest
from grin_study.pictures import plot_loads, plot_losses_of_arms, plot_routing
from grin_study.runs import compare_arms, read_runs
from grin_study.tables import loss_table, routing_table, verdict_table

from jaxscale.types import InputError

NAMES = {"a": "first arm", "b": "second arm"}
LOAD = [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]


def make_runs(losses):
    """Runs of two domains from arm -> seed -> loss."""
    runs = []
    for arm, of_seeds in losses.items():
        for seed, loss in of_seeds.items():
            domains = {name: {"loss": loss, "load": LOAD} for name in ("code", "prose")}
            runs.append({"arm": arm, "seed": seed, "loss": loss, "domains": domains})
    return runs


def test_runs_are_read_line_by_line(tmp_path):
    runs = make_runs({"a": {0: 1.0, 1: 2.0}})
    file = tmp_path / "study.jsonl"
    file.write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert read_runs(file) == runs


def test_arms_are_compared_seed_by_seed():
    first = {1: 2.0, 0: 1.0, 2: 3.0, 7: 99.0}
    second = {0: 1.001, 1: 2.002, 2: 3.003, 8: -99.0}
    runs = make_runs({"a": first, "b": second})
    found = compare_arms(runs, [("a", "b")], margin=0.01)["a", "b"]
    assert found.difference == pytest.approx(-0.002)
    assert found.verdict == "equivalent"


def test_a_repeated_run_is_refused():
    runs = make_runs({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.5}})
    message = r"two of arm 'a' and seed 0.*expected one run an arm and seed"
    with pytest.raises(InputError, match=message):
        compare_arms([*runs, runs[0]], [("a", "b")], margin=0.01)


def test_tables_and_pictures(tmp_path):
    runs = make_runs({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.5}})
    found = compare_arms(runs, [("a", "b")], margin=0.01)
    row = "| first arm - second arm | -0.5000 | -0.5000 to -0.5000 | 1 | different |"
    assert row in verdict_table(found, NAMES)
    assert "| second arm | 2.0000 |" in loss_table(runs, NAMES)
    plot_losses_of_arms(runs, found, NAMES, tmp_path / "loss.png", margin=0.01)
    plot_loads(runs, NAMES, tmp_path / "load.png")
    plot_routing(runs, NAMES, tmp_path / "routing.png", layer=1)
    for name in ("loss", "load", "routing"):
        picture = tmp_path / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_routing_table_has_a_row_a_domain():
    loads = {"code": np.array([[3.0, 1.0]]), "prose": np.array([[0.0, 8.0]])}
    rows = routing_table(loads, layer=0).splitlines()
    assert rows[0] == "| domain | 0 | 1 |"
    assert rows[2:] == ["| code | 75.0% | 25.0% |", "| prose | 0.0% | 100.0% |"]
