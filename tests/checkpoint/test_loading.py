"""Any source onto any mesh, in pieces; and a state that is not the one of the checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale import tree
from jaxscale.checkpoint.changes import Changes
from jaxscale.checkpoint.loading import load
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.types import InputError
from tests.checkpoint.states import abstract, assert_same, mesh_of, open_at

WITHOUT_OPTIMIZER = Changes(drawn="opt_state/.*", left_out="opt_state/.*")


class Recorded:
    """An array that notes the bytes of each read."""

    def __init__(self, whole):
        self.whole, self.shape, self.dtype = whole, whole.shape, whole.dtype
        self.reads = []

    def __getitem__(self, index):
        self.reads.append(self.whole[index].nbytes)
        return self.whole[index]


@pytest.mark.parametrize("budget_bytes", [1 << 20, 400])
def test_a_checkpoint_is_loaded_onto_any_mesh(saved_run, budget_bytes):
    folder, states = saved_run
    leaves = NativeCheckpoint(folder / "2").leaves()
    for shape in [(1, 1), (2, 4)]:
        wanted = abstract(states[2], mesh_of(*shape))
        got = load(leaves, wanted, budget_bytes=budget_bytes)
        assert_same(got, states[2])
        for leaf, struct in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding == struct.sharding


def test_a_share_larger_than_the_budget_is_read_in_pieces_and_replicas_once():
    whole = Recorded(np.random.default_rng(0).normal(size=(4, 16, 8)).astype(np.float32))
    sharding = NamedSharding(mesh_of(2, 4), PartitionSpec(None, "data", None))
    wanted = {"w": jax.ShapeDtypeStruct(whole.shape, jnp.bfloat16, sharding=sharding)}
    got = load({"w": whole}, wanted, budget_bytes=750)["w"]
    np.testing.assert_array_equal(np.asarray(got), whole.whole.astype(jnp.bfloat16))
    assert max(whole.reads) <= 250
    assert sum(whole.reads) == whole.whole.nbytes, "replicas were read anew"


def test_stored_chunks_are_read_once_and_whole():
    whole = Recorded(np.random.default_rng(0).normal(size=(4, 16, 8)).astype(np.float32))
    whole.chunk = (2, 4, 8)
    sharding = NamedSharding(mesh_of(2, 4), PartitionSpec(None, None, "tensor"))
    wanted = {"w": jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding)}
    got = load({"w": whole}, wanted, budget_bytes=3 * 512)["w"]
    np.testing.assert_array_equal(np.asarray(got), whole.whole)
    assert whole.reads == [2 * 8 * 8 * 4] * 4, "not in whole chunks"


def test_host_memory_is_filled_in_pieces_too():
    whole = Recorded(np.random.default_rng(0).normal(size=(4, 16, 8)).astype(np.float32))
    spec = PartitionSpec(None, "data", None)
    sharding = NamedSharding(mesh_of(2, 4), spec, memory_kind="pinned_host")
    wanted = {"w": jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=sharding)}
    got = load({"w": whole}, wanted, budget_bytes=750)["w"]
    assert got.sharding == sharding
    np.testing.assert_array_equal(np.asarray(got), whole.whole)


def test_what_is_loaded_stays_when_the_source_changes():
    source = np.ones((16, 16), np.float32)
    sharding = NamedSharding(mesh_of(1, 1), PartitionSpec())
    wanted = {"w": jax.ShapeDtypeStruct(source.shape, source.dtype, sharding=sharding)}
    got = load({"w": source}, wanted, budget_bytes=1 << 20)["w"]
    source[:] = 2
    np.testing.assert_array_equal(np.asarray(got), np.ones((16, 16)))


def test_arrays_of_another_mesh_are_handed_over_without_a_disk(saved_run):
    _, states = saved_run
    trained = jax.device_put(states[1]["params"], abstract_shardings(states[1], mesh_of(4, 2)))
    served = abstract(states[1]["params"], mesh_of(1, 2))
    assert_same(load(tree.flatten(trained), served, budget_bytes=1 << 20), states[1]["params"])


def abstract_shardings(state, mesh):
    return jax.tree.map(lambda leaf: leaf.sharding, abstract(state["params"], mesh))


def test_a_missing_leaf_and_another_shape_are_named(saved_run):
    folder, states = saved_run
    leaves = NativeCheckpoint(folder / "2").leaves()
    wanted = abstract(states[2], mesh_of(1, 1))
    without = {path: leaf for path, leaf in leaves.items() if path != "step"}
    with pytest.raises(InputError, match="given 'step', expected a leaf that it has"):
        load(without, wanted, budget_bytes=1 << 20)
    other = leaves | {"params/embed": np.zeros((3, 3), np.float32)}
    with pytest.raises(InputError, match=r"params/embed: given \(3, 3\), expected shape \(16, 8\)"):
        load(other, wanted, budget_bytes=1 << 20)


# Changes


def test_only_what_is_named_may_differ(tmp_path, saved_steps):
    states = saved_steps(tmp_path, 1)
    wanted = abstract(states[1], mesh_of(2, 2))
    checkpoints = open_at(tmp_path, fingerprint={"other": "model"})
    got, data_state = checkpoints.restore_changed(wanted, WITHOUT_OPTIMIZER)
    assert data_state == {"position": 1}
    assert not jax.tree.leaves(got["opt_state"])
    assert_same(got["params"], states[1]["params"])

    added = wanted | {"params": wanted["params"] | {"lora": wanted["params"]["embed"]}}
    with pytest.raises(InputError, match="the checkpoint lacks params/lora"):
        checkpoints.restore_changed(added, Changes())
    got, _ = checkpoints.restore_changed(added, Changes(drawn="params/lora"))
    assert got["params"]["lora"] is None
    assert_same(got["params"]["embed"], states[1]["params"]["embed"])

    dropped = wanted | {"params": {"layers": wanted["params"]["layers"]}}
    with pytest.raises(InputError, match="only the checkpoint has params/embed"):
        checkpoints.restore_changed(dropped, Changes())
    got, _ = checkpoints.restore_changed(dropped, Changes(left_out="params/embed"))
    assert set(got["params"]) == {"layers"}


def test_a_narrower_type_must_be_asked_for(tmp_path, saved_steps):
    states = saved_steps(tmp_path, 1)
    wanted = abstract(states[1], mesh_of(1, 1))
    attention = wanted["params"]["layers"]["0"]["attention"]
    q = attention["q"]
    attention["q"] = jax.ShapeDtypeStruct(q.shape, jnp.bfloat16, sharding=q.sharding)
    checkpoints = open_at(tmp_path)
    with pytest.raises(InputError, match="params/layers/0/attention/q as bfloat16"):
        checkpoints.restore_changed(wanted, Changes())
    got, _ = checkpoints.restore_changed(wanted, Changes(is_cast=True))
    whole = states[1]["params"]["layers"]["0"]["attention"]["q"]
    cast = np.asarray(whole).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got["params"]["layers"]["0"]["attention"]["q"], cast)


def test_a_pattern_in_vain_and_a_changed_shape_are_refused(tmp_path, saved_steps):
    states = saved_steps(tmp_path, 1)
    wanted = abstract(states[1], mesh_of(1, 1))
    checkpoints = open_at(tmp_path)
    for changes in (Changes(drawn="nothing"), Changes(left_out="nothing")):
        with pytest.raises(InputError, match="'nothing', expected a pattern that matches some"):
            checkpoints.restore_changed(wanted, changes)
    embed = wanted["params"]["embed"]
    wanted["params"]["embed"] = jax.ShapeDtypeStruct((8, 8), embed.dtype, sharding=embed.sharding)
    with pytest.raises(InputError, match=r"leaf params/embed as bfloat16\[8, 8\]"):
        checkpoints.restore_changed(wanted, WITHOUT_OPTIMIZER)
    with pytest.raises(InputError, match="a regular expression"):
        Changes(drawn="(")
