"""A run that lost devices goes on with those that are left, and its losses stay the same."""

import json

import jax
import pytest

from tests.run import runs


@pytest.fixture
def devices(monkeypatch):
    """Lets a test say how many devices are there."""
    every = jax.devices()

    def leave(number):
        monkeypatch.setattr(jax, "devices", lambda *_: every[:number])
        monkeypatch.setattr(jax, "device_count", lambda *_: number)

    return leave


@pytest.mark.long
def test_data_ranks_are_lost_and_come_back(gin_file, whole, devices, tmp_path, caplog):
    directory = tmp_path / "elastic"
    with runs.stop_at(runs.STOP):
        runs.train(gin_file, directory, "mesh.is_elastic=True")
    devices(7)  # of 8: 4 data ranks by 2 tensor ranks become 2 by 2
    with runs.stop_at(2 * runs.STOP):
        runs.train(gin_file, directory, "mesh.is_elastic=True")
    assert "7 devices instead of 8: data = 2 and num_microbatches = 2" in caplog.text
    devices(8)
    runs.train(gin_file, directory, "mesh.is_elastic=True")
    runs.assert_close_run(gin_file, directory, whole)
    starts = [json.loads(line) for line in (directory / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, runs.STOP, 2 * runs.STOP]
