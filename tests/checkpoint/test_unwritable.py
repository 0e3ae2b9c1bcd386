"""Checkpoints where nothing can be written: what is said, and that nothing on disk is harmed."""

import pathlib
import sys
import types

import jax
import numpy as np
import pytest

from jaxscale.checkpoint import handlers
from jaxscale.types import InputError
from tests.checkpoint.states import (
    abstract,
    assert_same,
    committed,
    mesh_of,
    open_at,
    small_state,
)


def test_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"checkpoint.directory: given '.*/file', expected a folder; this is a file"
    with pytest.raises(InputError, match=message):
        open_at(tmp_path / "file")
    with pytest.raises(InputError, match="Not a directory"):
        open_at(tmp_path / "file" / "below").prepare(small_state())


def test_unwritable_directory(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    folder = tmp_path / "a" / "b"
    checkpoints = open_at(folder)
    checkpoints.prepare(small_state())
    assert folder.is_dir()
    assert not list(folder.iterdir())
    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    message = r"a/b', expected a folder in which .*Permission denied"
    with pytest.raises(InputError, match=message):
        checkpoints.prepare(small_state())
    with pytest.raises(InputError, match=message):
        checkpoints.save(1, small_state(), {})


@pytest.fixture
def small_disk(mount_disk):
    return mount_disk("256k")


# When one write fails, orbax closes the event loop on which the others still wait.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)
def test_full_disk_stops_the_save_and_harms_nothing(small_disk, saved_steps):
    state = saved_steps(small_disk / "run", 1)[1]
    big = {"params": {"w": jax.random.normal(jax.random.key(0), (1 << 17,))}}
    checkpoints = open_at(small_disk / "run")
    checkpoints.save(2, big, {})
    message = r"run', expected a folder in which step 2 can be written .*No space left"
    with pytest.raises(InputError, match=message) as caught:
        checkpoints.wait()
    assert caught.value.__cause__ is not None
    assert checkpoints.latest_step() == 1
    assert_same(checkpoints.restore(abstract(state, mesh_of(1, 1)))[0], state)
    checkpoints.save(2, state, {})
    checkpoints.close()
    assert committed(small_disk / "run") == [1, 2]


def test_an_error_while_writing_surfaces_in_wait_with_its_cause(tmp_path, saved_steps, monkeypatch):
    def fail(folder):
        raise OSError(28, "No space left on device", str(folder))

    state = saved_steps(tmp_path, 1)[1]
    checkpoints = open_at(tmp_path)
    monkeypatch.setattr("jaxscale.checkpoint.manifest.write_manifest", fail)
    checkpoints.save(2, state, {})
    message = r"step 2 can be written .*No space left on device"
    with pytest.raises(InputError, match=message) as caught:
        checkpoints.wait()
    assert isinstance(caught.value.__cause__, OSError)
    checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.save(2, state, {})
    checkpoints.close()
    assert committed(tmp_path) == [1, 2]


def test_an_error_of_ours_while_writing_keeps_its_type(tmp_path, monkeypatch):
    def fail(folder):
        raise RuntimeError("a bug")

    checkpoints = open_at(tmp_path)
    monkeypatch.setattr("jaxscale.checkpoint.manifest.write_manifest", fail)
    checkpoints.save(1, small_state(), {})
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoints.wait()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": {"b": np.ones(3)}, "a.b": np.zeros(3)}, "paths that differ in more than a '.'"),
        ({"a/b": np.ones(3)}, "keys without '/'"),
        ({"a": np.ones((0, 3))}, r"params/a of shape \(0, 3\)"),
    ],
)
def test_leaves_that_would_overwrite_each_other_are_refused(tmp_path, params, message):
    """Of two of one folder the last was saved under both names."""
    state = jax.device_put({"params": params}, jax.devices()[0])
    checkpoints = open_at(tmp_path)
    with pytest.raises(InputError, match=message):
        checkpoints.prepare(jax.eval_shape(lambda: state))
    with pytest.raises(InputError, match=message):
        checkpoints.save(1, state, {})
    checkpoints.close()
    assert not committed(tmp_path)


def test_writes_that_end_after_another_failed_are_not_reported(monkeypatch):
    """Each finds orbax's event loop closed; any other report is passed on."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    handlers.silence.__wrapped__()
    for message in ("Event loop is closed", "another"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(message)))
    assert [str(lost.exc_value) for lost in reported] == ["another"]
