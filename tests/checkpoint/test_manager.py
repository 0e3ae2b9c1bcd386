"""Saving and restoring: what comes back, what is kept, damage, and checkpoints of another model."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxscale.checkpoint.changes import Changes
from jaxscale.checkpoint.manager import CheckpointConfig
from jaxscale.checkpoint.steps import keep_only
from jaxscale.types import InputError
from tests.checkpoint.states import (
    FINGERPRINT,
    abstract,
    assert_same,
    build_state,
    committed,
    make_state,
    mesh_of,
    open_at,
    small_state,
)


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def swap(path):
    """Puts what another step has under this name in its place."""
    step = next(parent for parent in path.parents if parent.name.isdecimal())
    other = step.with_name(str(int(step.name) - 1)) / path.relative_to(step)
    path.write_bytes(other.read_bytes())


# What comes back


@pytest.mark.parametrize("is_async", [True, False])
def test_same_mesh_is_bit_identical(tmp_path, is_async):
    state = make_state(mesh_of(4, 2))
    checkpoints = open_at(tmp_path / "new" / "folder", is_async=is_async)
    assert checkpoints.latest_step() is None
    assert checkpoints.save(7, state, {"sources": {"a": [1, 2]}, "step": 7})
    restored, data_state = checkpoints.restore(abstract(state, mesh_of(4, 2)))
    checkpoints.close()
    assert_same(restored, state)
    assert data_state == {"sources": {"a": [1, 2]}, "step": 7}


def test_a_state_may_hold_several_models_under_names(tmp_path):
    models = {name: make_state(mesh_of(4, 2), seed=n) for n, name in enumerate(("actor", "critic"))}
    checkpoints = open_at(tmp_path)
    checkpoints.save(1, {"params": models}, {})
    wanted = {name: abstract(state, mesh_of(2, 2)) for name, state in models.items()}
    assert_same(checkpoints.restore({"params": wanted})[0], {"params": models})
    without_critic = Changes(left_out="params/critic/.*")
    actor, _ = checkpoints.restore_changed({"params": {"actor": wanted["actor"]}}, without_critic)
    checkpoints.close()
    assert_same(actor["params"]["actor"], models["actor"])


def test_every_mesh_gives_the_same_values_in_the_placement_asked_for(tmp_path):
    state = make_state(mesh_of(4, 2))
    checkpoints = open_at(tmp_path)
    checkpoints.save(1, state, {})
    for shape in [(2, 4), (8, 1), (2, 2), (1, 1)]:
        wanted = abstract(state, mesh_of(*shape))
        restored, _ = checkpoints.restore(wanted)
        assert_same(restored, state)
        for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
            assert got.sharding == want.sharding
    checkpoints.close()


def test_tree_on_disk_does_not_depend_on_the_mesh(tmp_path):
    def leaf_folders(name, mesh):
        checkpoints = open_at(tmp_path / name)
        checkpoints.save(1, make_state(mesh), {})
        checkpoints.close()
        return {path.name for path in (tmp_path / name / "1" / "state").iterdir()}

    assert leaf_folders("one", mesh_of(1, 1)) == leaf_folders("eight", mesh_of(4, 2))


def test_state_may_be_donated_right_after_save(tmp_path):
    sharding = NamedSharding(mesh_of(4, 2), PartitionSpec("data", "tensor"))
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0, out_shardings=sharding)
    want = np.arange(1 << 20, dtype=np.float32).reshape(1 << 10, 1 << 10)
    value = jax.device_put(want, sharding)
    checkpoints = open_at(tmp_path)
    checkpoints.save(1, {"params": {"w": value}}, {})
    overwrite(value).block_until_ready()
    wanted = jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=sharding)
    restored, _ = checkpoints.restore({"params": {"w": wanted}})
    checkpoints.close()
    np.testing.assert_array_equal(np.asarray(restored["params"]["w"]), want)


def test_restore_params_reads_no_optimizer_byte_and_casts(tmp_path, saved_steps):
    state = saved_steps(tmp_path, 1)[1]
    for path in (tmp_path / "1" / "state").glob("opt_state.*/[0-9]*"):
        path.unlink()
    checkpoints = open_at(tmp_path)
    wanted = abstract(state["params"], mesh_of(2, 1))
    assert_same(checkpoints.restore_params(wanted), state["params"])

    def as_half(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding)

    half = checkpoints.restore_params(jax.tree.map(as_half, wanted))
    assert_same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state["params"]))
    checkpoints.close()


def test_an_earlier_step_can_be_named(tmp_path, saved_steps):
    states = saved_steps(tmp_path, 1, 2)
    checkpoints = open_at(tmp_path)
    restored, data_state = checkpoints.restore(abstract(states[1], mesh_of(1, 1)), step=1)
    assert_same(restored, states[1])
    assert data_state == {"position": 1}
    with pytest.raises(InputError, match=r"^step: given 3, expected one of the steps .*\[1, 2\]"):
        checkpoints.restore(abstract(states[1], mesh_of(1, 1)), step=3)


# What is saved and kept


def test_only_due_steps_are_saved_unless_forced(tmp_path):
    checkpoints = open_at(tmp_path, save_every=5)
    is_saved = [checkpoints.save(step, small_state(), {}) for step in (4, 5, 6)]
    assert is_saved == [False, True, False]
    assert checkpoints.save(7, small_state(), {}, force=True)
    checkpoints.close()
    assert committed(tmp_path) == [5, 7]


def test_keep_last_and_keep_every(tmp_path):
    checkpoints = open_at(tmp_path, save_every=2, keep_last=2, keep_every=4)
    for step in range(2, 15, 2):
        checkpoints.save(step, small_state(), {})
    checkpoints.close()
    assert committed(tmp_path) == [4, 8, 12, 14]


def test_by_time_and_by_distance_in_steps(tmp_path):
    for step in (4, 9, 12, 19, 23, 27, 28, 31):
        (tmp_path / str(step)).mkdir()
        written = time.time() - 3600 * (1 if step > 20 else 5)
        os.utime(tmp_path / str(step), (written, written))
    config = CheckpointConfig(str(tmp_path), save_every=1, keep_last=1, keep_hours=2.0)
    # 4, 9, 19 and 31 are closest to 0, 10, 20 and 30.
    keep_only(tmp_path, dataclasses.replace(config, keep_closest=10).keeping)
    assert committed(tmp_path) == [4, 9, 19, 23, 27, 28, 31]
    keep_only(tmp_path, config.keeping)
    assert committed(tmp_path) == [23, 27, 28, 31]


def test_a_committed_step_is_not_written_again(tmp_path, saved_steps):
    states = saved_steps(tmp_path, 3)
    checkpoints = open_at(tmp_path)
    assert not checkpoints.save(3, make_state(mesh_of(1, 1), seed=99), {}, force=True)
    assert_same(checkpoints.restore(abstract(states[3], mesh_of(1, 1)))[0], states[3])


def test_newer_checkpoints_in_the_folder_stop_a_run_that_did_not_resume(tmp_path, saved_steps):
    states = saved_steps(tmp_path, 3)
    message = "without checkpoints newer than step 1; this one has step 3"
    with pytest.raises(InputError, match=message):
        open_at(tmp_path).save(1, states[3], {})
    assert committed(tmp_path) == [3]


def test_half_written_and_half_deleted_steps_are_ignored_then_removed(tmp_path, saved_steps):
    states = saved_steps(tmp_path, 1)
    for name in ("2.orbax-checkpoint-tmp", "0.deleted"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    checkpoints = open_at(tmp_path)
    assert checkpoints.latest_step() == 1
    assert_same(checkpoints.restore(abstract(states[1], mesh_of(1, 1)))[0], states[1])
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists(), "reading must not write"
    checkpoints.save(2, states[1], {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


# Damage


# Files of orbax in the step's folder that nothing reads.
UNREAD = {"_CHECKPOINT_METADATA", "commit_success.txt"}
DAMAGES = (flip_byte, truncate, pathlib.Path.unlink, swap)


def test_every_damaged_file_is_named_with_its_step(tmp_path, saved_steps):
    state = saved_steps(tmp_path, 1, 2)[2]
    wanted = abstract(state, mesh_of(1, 1))
    checkpoints = open_at(tmp_path)
    step = tmp_path / "2"
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    for number, path in enumerate(files):
        with damaged(path, DAMAGES[number % 3]):
            if path.parent == step and path.name in UNREAD:
                assert_same(checkpoints.restore(wanted)[0], state)
            else:
                message = message_of_damage(checkpoints, wanted)
                assert str(path.relative_to(step)) in message
    checkpoints.close()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_leaf_is_named(tmp_path, saved_steps, damage):
    state = saved_steps(tmp_path, 1, 2)[2]
    (folder,) = (tmp_path / "2" / "state").glob("params.layers.0.attention.q")
    with damaged(folder / "0.0.0", damage):
        message = message_of_damage(open_at(tmp_path), abstract(state, mesh_of(1, 1)))
    assert "leaf params/layers/0/attention/q" in message


def message_of_damage(checkpoints, wanted):
    """What a restore says when step 2 is damaged."""
    expected = r"/2'.*use_previous = True restores step 1"
    with pytest.raises(InputError, match=expected) as caught:
        checkpoints.restore(wanted)
    return str(caught.value)


@contextlib.contextmanager
def damaged(path, damage):
    sound = path.read_bytes()
    damage(path)
    try:
        yield
    finally:
        path.write_bytes(sound)


def test_the_step_before_is_used_only_on_request_and_the_run_goes_on_from_there(
    tmp_path, saved_steps
):
    states = saved_steps(tmp_path, 1, 2, 3)
    wanted = abstract(states[1], mesh_of(1, 1))
    for step in (2, 3):
        flip_byte(tmp_path / str(step) / "state" / "params.embed" / "0.0")
    checkpoints = open_at(tmp_path, use_previous=True, keep_last=1)
    restored, data_state = checkpoints.restore(wanted)
    assert_same(restored, states[1])
    assert data_state == {"position": 1}
    checkpoints.save(2, states[1], {"position": 2})
    checkpoints.close()
    assert committed(tmp_path) == [2]
    set_aside = {path.name for path in tmp_path.glob("*.damaged")}
    assert set_aside == {"2.damaged", "3.damaged"}
    assert_same(open_at(tmp_path).restore(wanted)[0], states[1])


def test_nothing_but_damage_is_an_error_even_with_use_previous(tmp_path, saved_steps):
    state = saved_steps(tmp_path, 1)[1]
    (tmp_path / "1" / "checksums.json").unlink()
    with pytest.raises(InputError, match="a sound checkpoint; every one is damaged"):
        open_at(tmp_path, use_previous=True).restore(abstract(state, mesh_of(1, 1)))


def test_a_deletion_that_is_cut_short_leaves_no_step_that_looks_damaged(
    tmp_path, monkeypatch, saved_steps
):
    states = saved_steps(tmp_path, 1, 2)
    checkpoints = open_at(tmp_path, keep_last=1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", interrupted)
        checkpoints.save(3, states[2], {})
        checkpoints.wait()
    assert committed(tmp_path) == [2, 3]
    checkpoints.save(4, states[2], {})
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"4"}


def interrupted(path, *arguments, **options):
    """Half a deletion."""
    next(path.rglob("*.json")).unlink()
    raise KeyboardInterrupt


# Not this run's checkpoint


def test_another_model_is_named_by_its_fields(tmp_path, saved_steps):
    state = saved_steps(tmp_path, 1)[1]
    other = {
        "num_layers": 2,
        "attention": {"num_heads": 8, "window": None},
        "pattern": (1, 2),
        "bias": True,
    }
    checkpoints = open_at(tmp_path, fingerprint=other)
    message = (
        r"with attention.num_heads=8, bias=True; "
        r"it is of another model with attention.num_heads=4, bias='\(absent\)'"
    )
    with pytest.raises(InputError, match=message):
        checkpoints.restore(abstract(state, mesh_of(1, 1)))
    with pytest.raises(InputError, match=message):
        checkpoints.restore_params({})


def test_a_new_field_is_added_and_one_that_is_gone_does_not_matter(tmp_path, saved_steps):
    state = saved_steps(tmp_path, 1)[1]
    wanted = abstract(state, mesh_of(1, 1))
    facts = {name: value for name, value in FINGERPRINT.items() if name != "pattern"}

    def upgrade(saved):
        return saved | {"bias": False}

    open_at(tmp_path, fingerprint=facts | {"bias": False}, upgrade=upgrade).restore(wanted)
    other = open_at(tmp_path, fingerprint=facts | {"bias": True}, upgrade=upgrade)
    with pytest.raises(InputError, match="with bias=True; it is of another model with bias=False"):
        other.restore(wanted)


def test_a_leaf_is_restored_in_a_wider_type_and_not_in_a_narrower_one(tmp_path):
    here = SingleDeviceSharding(jax.devices()[0])
    scale = jnp.asarray([1.0, 1.0078125, 3e38], "bfloat16")
    checkpoints = open_at(tmp_path)
    checkpoints.save(1, {"scale": scale}, {})
    checkpoints.wait()

    def wanted(dtype):
        return {"scale": jax.ShapeDtypeStruct(scale.shape, jnp.dtype(dtype), sharding=here)}

    found = checkpoints.restore(wanted("float32"))[0]["scale"]
    assert found.dtype == "float32"
    np.testing.assert_array_equal(found, scale.astype("float32"))
    with pytest.raises(InputError, match="leaf scale as float16"):
        checkpoints.restore(wanted("float16"))
    checkpoints.close()


def test_wrong_leaves_are_named(tmp_path, saved_steps):
    saved_steps(tmp_path, 1)
    checkpoints = open_at(tmp_path)
    state = jax.eval_shape(build_state)
    params = state["params"]

    def check(other, message):
        with pytest.raises(InputError) as caught:
            checkpoints.restore(abstract(other, mesh_of(1, 1)))
        assert message in str(caught.value)

    for dim in (8, 32):  # neither padded nor cut
        wider = jax.eval_shape(functools.partial(build_state, dim=dim))["params"]
        check(
            {**state, "params": {**wider, "embed": params["embed"]}},
            f"leaf params/layers/0/attention/q as float32[2, {dim}, 8]; it holds float32[2, 16, 8]",
        )
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    check({**state, "params": half}, "as bfloat16[2, 16, 8]; it holds float32[2, 16, 8]")
    check({**state, "extra": jnp.zeros(3)}, "the checkpoint lacks extra")
    del state["key"]
    check(state, "only the checkpoint has key")


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(InputError, match="a folder with a checkpoint; there is none"):
        open_at(tmp_path / "absent").restore({})
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("settings", "parameter"),
    [
        ({"save_every": 0}, "save_every"),
        ({"keep_last": 0}, "keep_last"),
        ({"save_every": 4, "keep_every": 6}, "keep_every % save_every == 0, with save_every = 4"),
        ({"save_every": 1.5}, "save_every"),
        ({"directory": "gs://bucket/run"}, "local or mounted folder"),
    ],
)
def test_settings_are_checked(settings, parameter):
    sound = {"directory": "runs/x", "save_every": 1, "keep_last": 1}
    with pytest.raises(InputError, match=parameter):
        CheckpointConfig(**{**sound, **settings})
