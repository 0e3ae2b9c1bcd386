"""Where figures go beside the history: TensorBoard's file, and Weights & Biases by a stand-in."""

import importlib.machinery
import importlib.util
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from jaxscale.train.reporters import TensorBoard, Wandb, check_reporters
from jaxscale.types import InputError


def read_events(path):
    """The events of a TensorBoard file: length, its checksum, event, its checksum, and so on."""
    data, events = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        event = data[12 : 12 + length]
        assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(event)
        events.append(Event.FromString(event))
        data = data[16 + length :]
    return events


def read_values(directory):
    """(step, value) of all that is in the one file of a run."""
    (path,) = (directory / "tensorboard").iterdir()
    return [(event.step, value) for event in read_events(path) for value in event.summary.value]


def test_tensorboard_gets_scalars_and_texts(tmp_path):
    writer = TensorBoard()(tmp_path, 0)
    writer.report(1, {"loss": 2.5, "load": np.ones((2, 4))})
    writer.report(2, {"held_out/loss": 1.5, "samples/0": "def f"})
    writer.close()
    *scalars, (step, text) = read_values(tmp_path)
    found = [(value.tag, step, value.simple_value) for step, value in scalars]
    assert found == [("loss", 1, 2.5), ("held_out/loss", 2, 1.5)]
    assert step == 2 and text.tag.startswith("samples/0")
    assert text.tensor.string_val == [b"def f"]


def test_each_start_has_a_tensorboard_file_of_its_own(tmp_path):
    """What the first has from step 8 on is hidden."""
    for step in (0, 7):
        TensorBoard()(tmp_path, step).close()
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    assert [event.step for event in read_events(second)] == [0, 8]
    assert read_events(first)[0].file_version == "brain.Event:2"


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which writes down what it is asked to do."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.calls = []

    def note(name):
        return lambda *args, **named: module.calls.append((name, *args, *named.items()))

    def init(**settings):
        module.calls.append(("init", settings))
        return types.SimpleNamespace(**{name: note(name) for name in methods})

    methods = ("define_metric", "log", "finish")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_scalars_and_texts_and_a_resumed_run_goes_on(wandb, tmp_path):
    (tmp_path / "config.gin").write_text("a = 1")
    reporter = Wandb("jaxscale-tests")
    check_reporters([reporter])
    for step in (0, 1):
        run = reporter(tmp_path, step)
        figures = {"loss": 2.5, "load": np.ones((2, 4)), "samples/0": "def f"}
        run.report(step + 1, figures)
        run.close()
    (_, first), metric, log, finish, (_, second), *_ = wandb.calls
    assert metric == ("define_metric", "*", ("step_metric", "step"))
    assert log == ("log", {"step": 1, "loss": 2.5, "samples/0": "def f"})
    assert finish == ("finish",)
    assert first["project"] == "jaxscale-tests" and first["name"] == tmp_path.name
    assert first["config"] == {"config.gin": "a = 1"} and first["dir"] == str(tmp_path)
    assert first["id"] == second["id"] and second["resume"] == "allow"


def test_a_reporter_that_cannot_report_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"given 'no wandb', .*pip install 'jaxscale\[wandb\]'"):
        check_reporters([Wandb("a")])
    with pytest.raises(InputError, match=r"reporters\[0\]: .*@TensorBoard\(\) with brackets"):
        check_reporters([TensorBoard])
