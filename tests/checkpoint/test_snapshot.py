"""Saves from a snapshot on the device: what is written, errors, and when there is one."""

import logging

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import replica_slices

from jaxscale.checkpoint import writer
from jaxscale.types import InputError
from tests.checkpoint.states import abstract, assert_same, make_state, mesh_of, open_at


def test_it_holds_the_state_as_it_was_at_the_save(tmp_path):
    sharding = NamedSharding(mesh_of(4, 2), PartitionSpec("data", "tensor"))
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0, out_shardings=sharding)
    want = np.arange(1 << 20, dtype=np.float32).reshape(1 << 10, 1 << 10)
    checkpoints = open_at(tmp_path, use_snapshot=True)
    for step in range(1, 4):
        value = jax.device_put(want + step, sharding)
        checkpoints.save(step, {"params": {"w": value}}, {"position": step})
        overwrite(value).block_until_ready()
    wanted = jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=sharding)
    for step in range(1, 4):
        restored, position = checkpoints.restore({"params": {"w": wanted}}, step)
        np.testing.assert_array_equal(np.asarray(restored["params"]["w"]), want + step)
        assert position == {"position": step}
    checkpoints.close()


def test_its_memory_is_free_once_the_save_is_committed(tmp_path):
    """Or the next save would need room for two."""
    state = make_state(mesh_of(4, 2))
    checkpoints = open_at(tmp_path, use_snapshot=True)
    before = jax.live_arrays()
    for step in (1, 2):
        checkpoints.save(step, state, {})
        checkpoints.wait()
        held = {id(array) for array in before}
        assert [array.shape for array in jax.live_arrays() if id(array) not in held] == []
    checkpoints.close()


def test_a_whole_state_with_its_key_goes_there_and_back(tmp_path):
    state = make_state(mesh_of(4, 2))
    checkpoints = open_at(tmp_path, use_snapshot=True)
    checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore(abstract(state, mesh_of(2, 2)))
    checkpoints.close()
    assert_same(restored, state)


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_a_key_stays_of_its_kind(tmp_path, implementation):
    key = jax.random.key(3, impl=implementation)
    state = {"params": {"w": np.ones(2, np.float32)}, "key": key}
    state = jax.device_put(state, jax.devices()[0])
    checkpoints = open_at(tmp_path, use_snapshot=True)
    checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore(abstract(state, mesh_of(1, 1)))
    checkpoints.close()
    assert restored["key"].dtype == key.dtype
    assert jax.random.bits(restored["key"]) == jax.random.bits(key)


def test_leaves_are_copied_to_the_host_one_by_one_and_the_largest_first(tmp_path, monkeypatch):
    """So memory for two of the largest is enough, and none is pinned later."""
    copied = []
    copy = replica_slices.transfer_arrays_to_host

    def recorded(arrays, **options):
        copied.append([array.nbytes for array in arrays])
        return copy(arrays, **options)

    monkeypatch.setattr(replica_slices, "transfer_arrays_to_host", recorded)
    state = make_state(mesh_of(4, 2))
    checkpoints = open_at(tmp_path, use_snapshot=True)
    checkpoints.save(1, state, {})
    checkpoints.close()
    sizes = sorted((leaf.nbytes for leaf in jax.tree.leaves(state)), reverse=True)
    assert copied == [[size] for size in sizes]


def test_a_write_that_fails_is_raised_by_the_next_call(tmp_path, monkeypatch):
    checkpoints = open_at(tmp_path, use_snapshot=True)
    state = make_state(mesh_of(1, 1))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writer.handlers, "state_to_save", full)
        checkpoints.save(1, state, {})
        with pytest.raises(InputError, match=r"step 1 can be written .*No space left"):
            checkpoints.wait()
    assert checkpoints.save(2, state, {})
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


class Memory:
    """A device with so much memory, of which 100 bytes are in use."""

    device_kind = "a kind"

    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return self.limit and {"bytes_limit": self.limit, "peak_bytes_in_use": 100}


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (1 << 30, "a snapshot on the device"),
        (1000, "are not free"),
        (None, "does not say how much memory is free"),
    ],
)
def test_where_there_is_room_is_chosen_and_logged(tmp_path, monkeypatch, caplog, limit, message):
    free = writer._free_bytes
    monkeypatch.setattr(writer, "_free_bytes", lambda device: free(Memory(limit)))
    checkpoints = open_at(tmp_path)
    with caplog.at_level(logging.INFO, "jaxscale"):
        checkpoints.save(1, make_state(mesh_of(1, 1)), {})
    checkpoints.close()
    assert message in caplog.text
