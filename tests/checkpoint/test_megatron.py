"""Weights by tensor, pipeline and expert rank, laid out by this test as Megatron-LM does."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxscale.checkpoint import megatron, megatron_buckets, megatron_buffers
from jaxscale.checkpoint.megatron_buffers import buffered_states
from jaxscale.checkpoint.megatron_optimizer import Weight, states_of
from jaxscale.checkpoint.opening import open_checkpoint
from jaxscale.checkpoint.pickled import Named
from jaxscale.checkpoint.torch_distributed import DistributedCheckpoint
from jaxscale.checkpoint.torch_file import load_torch
from jaxscale.checkpoint.torch_writer import save_torch
from jaxscale.types import InputError

FIXTURES = Path(__file__).with_name("fixtures") / "megatron"
NUM_TENSOR, NUM_STAGES, NUM_GROUPS = 2, 2, 2
NUM_LAYERS, NUM_EXPERTS, DIM, FFN, VOCAB, PADDED = 3, 4, 6, 8, 10, 12
STAGE_LAYERS = ([0, 1], [2])


def whole_weights():
    """The whole model by global names; gate and up are each [FFN, DIM], one after the other."""
    draw = np.random.default_rng(0)
    shapes = {"embedding.word_embeddings.weight": (VOCAB, DIM), "output_layer.weight": (VOCAB, DIM)}
    shapes["decoder.final_layernorm.weight"] = (DIM,)
    for layer in range(NUM_LAYERS):
        own = f"decoder.layers.{layer}."
        shapes[f"{own}self_attention.linear_qkv.weight"] = (16, DIM)
        shapes[f"{own}self_attention.linear_qkv.layer_norm_weight"] = (DIM,)
        shapes[f"{own}self_attention.linear_proj.weight"] = (DIM, 8)
        shapes[f"{own}mlp.router.weight"] = (NUM_EXPERTS, DIM)
        for expert in range(NUM_EXPERTS):
            shapes[f"{own}mlp.experts.local_experts.{expert}.linear_fc1.weight"] = (2 * FFN, DIM)
            shapes[f"{own}mlp.experts.local_experts.{expert}.linear_fc2.weight"] = (DIM, FFN)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def part_of(name, whole, tensor):
    if "embed" in name or "output_layer" in name:
        return np.split(np.pad(whole, ((0, PADDED - VOCAB), (0, 0))), NUM_TENSOR)[tensor]
    if "linear_fc1" in name:
        return np.concatenate([np.split(half, NUM_TENSOR)[tensor] for half in np.split(whole, 2)])
    if "linear_qkv.weight" in name:
        return np.split(whole, NUM_TENSOR)[tensor]
    if "linear_proj" in name or "linear_fc2" in name:
        return np.split(whole, NUM_TENSOR, axis=1)[tensor]
    return whole


def own_name(name, stage, group):
    """What a rank calls a weight; None where it does not have it."""
    if layer := re.match(r"decoder\.layers\.(\d+)\.", name):
        if int(layer[1]) not in STAGE_LAYERS[stage]:
            return None
        name = name.replace(layer[0], f"decoder.layers.{STAGE_LAYERS[stage].index(int(layer[1]))}.")
    elif (stage == 0) != name.startswith("embedding"):
        return None
    if expert := re.search(r"local_experts\.(\d+)\.", name):
        each = NUM_EXPERTS // NUM_GROUPS
        if int(expert[1]) // each != group:
            return None
        name = name.replace(expert[0], f"local_experts.{int(expert[1]) % each}.")
    return name


def write(folder, whole, changed=lambda weights, ranks: None):
    for ranks in itertools.product(range(NUM_TENSOR), range(NUM_STAGES), range(NUM_GROUPS)):
        tensor, stage, group = ranks
        weights = {}
        for name, array in whole.items():
            own = own_name(name, stage, group)
            if own is not None:
                weights[own] = part_of(name, array, tensor)
        weights["decoder.layers.0.mlp._extra_state"] = None
        changed(weights, ranks)
        rank = folder / "iter_0000100" / f"mp_rank_{tensor:02d}_{stage:03d}_{group:03d}"
        rank.mkdir(parents=True)
        content = {"iteration": 100, "model": weights}
        save_torch(rank / "model_optim_rng.pt", content, piece_bytes=1000)
    (folder / "latest_checkpointed_iteration.txt").write_text("100\n")


@pytest.fixture
def gated(monkeypatch):
    """Files whose program had gated experts and a vocabulary of 10."""
    load = megatron.load_torch

    def with_arguments(path):
        values = {"swiglu": True, "vocab_size": VOCAB}
        return load(path) | {"args": Named("argparse.Namespace", (), values)}

    monkeypatch.setattr(megatron, "load_torch", with_arguments)


def test_ranks_make_up_the_weights(tmp_path, gated):
    whole = whole_weights()
    write(tmp_path, whole)
    opened = open_checkpoint(tmp_path)
    leaves = opened.source.leaves()
    assert opened.kind == "Megatron-LM" and opened.path.name == "iter_0000100"
    assert leaves.keys() == whole.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf[:], whole[name], err_msg=name)


def test_a_weight_without_a_rule_is_named(tmp_path, gated):
    def changed(weights, ranks):
        weights["decoder.layers.0.mlp.shared_experts.linear_fc1.weight"] = np.ones(2, np.float32)

    write(tmp_path, whole_weights(), changed)
    with pytest.raises(InputError, match=r"shared_experts.*exactly one rule"):
        open_checkpoint(tmp_path).source.leaves()


def test_a_lost_expert_is_named(tmp_path, gated):
    def changed(weights, ranks):
        if ranks == (1, 0, 1):
            del weights["decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight"]

    write(tmp_path, whole_weights(), changed)
    with pytest.raises(InputError, match=r"local_experts.0.linear_fc2.*missing are \[1\]"):
        open_checkpoint(tmp_path).source.leaves()


@pytest.mark.parametrize("lost", ["mp_rank_01_*", "mp_rank_*_001_*", "mp_rank_00_000_001"])
def test_lost_ranks_are_named(tmp_path, monkeypatch, lost):
    """Without the last ones the weights would be whole, but smaller."""
    write(tmp_path, whole_weights())
    sizes = {"tensor": NUM_TENSOR, "pipeline": NUM_STAGES, "expert": NUM_GROUPS}
    values = {f"{axis}_model_parallel_size": size for axis, size in sizes.items()}
    arguments = Named("argparse.Namespace", (), values | {"swiglu": True, "vocab_size": VOCAB})
    load = megatron.load_torch
    monkeypatch.setattr(megatron, "load_torch", lambda path: load(path) | {"args": arguments})
    assert open_checkpoint(tmp_path).source.leaves()
    for folder in tmp_path.glob(f"*/{lost}"):
        shutil.rmtree(folder)
    with pytest.raises(InputError, match="a folder of rank tensor="):
        open_checkpoint(tmp_path).source.leaves()


def test_a_program_of_one_stage_leaves_its_number_out(tmp_path, monkeypatch):
    """Expert ranks are no stages: layers would be there twice, each with half of the experts."""
    monkeypatch.setattr("tests.checkpoint.test_megatron.STAGE_LAYERS", (range(NUM_LAYERS),))
    monkeypatch.setattr("tests.checkpoint.test_megatron.NUM_STAGES", 1)
    whole = whole_weights()
    for name in ("decoder.final_layernorm.weight", "output_layer.weight"):
        del whole[name]  # of a last stage
    write(tmp_path, whole)
    for folder in list(tmp_path.glob("*/mp_rank_*")):
        folder.rename(folder.with_name(folder.name.replace("_000_", "_")))
    values = {"swiglu": True, "vocab_size": VOCAB, "tensor_model_parallel_size": 2}
    values |= {"pipeline_model_parallel_size": 1, "expert_model_parallel_size": 2}
    load = megatron.load_torch

    def with_arguments(values):
        arguments = Named("argparse.Namespace", (), values)
        monkeypatch.setattr(megatron, "load_torch", lambda path: load(path) | {"args": arguments})

    with_arguments(values)
    leaves = open_checkpoint(tmp_path).source.leaves()
    assert leaves.keys() == whole.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf[:], whole[name], err_msg=name)
    with_arguments(values | {"expert_tensor_parallel_size": 1})
    with pytest.raises(InputError, match=r"expert_tensor_parallel_size: given 1, expected 2"):
        open_checkpoint(tmp_path).source.leaves()


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("float32", "mp_rank_01_001/model_optim_rng.pt"),
        ("buckets", "mp_rank_00_001/distrib_optim.pt"),
        ("buckets_experts", "mp_rank_00_001_001/distrib_optim.pt"),
    ],
)
def test_a_lost_file_is_named(tmp_path, kind, file):
    """That of an optimizer too: weights of 16 bits would take the place of its masters."""
    shutil.copytree(FIXTURES / kind, tmp_path / kind)
    (tmp_path / kind / "iter_0000003" / file).unlink()
    with pytest.raises(InputError, match=file):
        open_checkpoint(tmp_path / kind).source.leaves()


def test_buckets_without_their_file_of_arguments_are_refused(tmp_path):
    shutil.copytree(FIXTURES / "bucketed" / "torch_dist", tmp_path / "new")
    (tmp_path / "new" / "common.pt").unlink()
    with pytest.raises(InputError, match=r"common\.pt"):
        open_checkpoint(tmp_path / "new").source.leaves()


# What megatron-core itself has saved, see experiments/checkpoints/megatron_fixtures.py


def oracle_of(folder):
    """What its ranks hold by its own account of where that belongs, layer by layer."""
    apart = {}
    for key, array in np.load(folder / "oracle.npz").items():
        _, separator, state = key.partition("optimizer.state.")
        state, _, weight = state.partition(".") if separator else ("", "", key)
        renamed = weight.replace("self_attention.linear_qkv.layer_norm", "input_layernorm.")
        renamed = renamed.replace("mlp.linear_fc1.layer_norm", "pre_mlp_layernorm.")
        renamed = renamed.replace("layernorm._weight", "layernorm.weight")
        start = f"{state}/" if state else ""
        is_stacked = ".layers." in renamed and not re.search(r"\.layers\.\d", renamed)
        if not is_stacked:
            apart[start + renamed] = array
        for layer, own in enumerate(array if is_stacked else ()):
            apart[start + renamed.replace(".layers.", f".layers.{layer}.")] = own
    # In place of weights of 16 bits, their masters.
    masters = {name: apart.pop(name) for name in list(apart) if name.startswith("fp32_param/")}
    return apart | {name.removeprefix("fp32_param/"): array for name, array in masters.items()}


def assert_holds_what_its_ranks_held(folder):
    leaves = open_checkpoint(folder).source.leaves()
    wanted = oracle_of(folder)
    assert leaves.keys() == wanted.keys()
    for path, leaf in leaves.items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf[:], wanted[path], err_msg=path)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "buckets", "buckets_experts"])
def test_weights_masters_and_moments_are_those_of_megatron_core(name):
    assert_holds_what_its_ranks_held(FIXTURES / name)


def assert_buckets_hold_what_its_ranks_held(folder):
    leaves = open_checkpoint(folder / "torch_dist").source.leaves()
    wanted = np.load(folder / "oracle.npz")
    assert leaves.keys() == set(wanted)
    for path, leaf in leaves.items():
        assert leaf.dtype == (np.float32 if path.startswith("optimizer.") else "bfloat16")
        np.testing.assert_array_equal(leaf[:].astype(np.float32), wanted[path], err_msg=path)


@pytest.mark.parametrize("name", ["bucketed", "bucketed_experts"])
def test_buckets_of_its_distributed_format_become_states_of_weights(name):
    assert_buckets_hold_what_its_ranks_held(FIXTURES / name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"transformer_impl": "transformer_engine"}, r"a bucket of group 0 with decoder"),
        ({"transformer_impl": "inference_optimized"}, "one of local, transformer_engine"),
        ({"virtual_pipeline_model_parallel_size": 2}, "stages of one chunk"),
        ({"expert_tensor_parallel_size": 1}, "expert_tensor_parallel_size: given 1, expected 2"),
        ({"pipeline_model_parallel_size": 1}, r"a bucket of group 0 with decoder"),
        ({"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 4}, "buckets of"),
    ],
)
def test_buckets_of_another_program_are_refused(changed, message):
    folder = FIXTURES / "bucketed" / "torch_dist"
    leaves = DistributedCheckpoint(folder).leaves()
    given = load_torch(folder / megatron_buckets.COMMON)["args"].state
    arguments = Named("argparse.Namespace", (), given | changed)
    with pytest.raises(InputError, match=message):
        megatron_buckets.with_states_by_name(leaves, arguments)


def test_buckets_in_another_order_of_weights_are_refused(monkeypatch):
    """Of two weights of one shape each has the other's place."""
    order = list(megatron_buckets.IN_LAYER)
    one, two = map(order.index, ("self_attention.linear_qkv.weight", "mlp.linear_fc2.weight"))
    order[one], order[two] = order[two], order[one]
    monkeypatch.setattr(megatron_buckets, "IN_LAYER", tuple(order))
    with pytest.raises(InputError, match="the float32 master of decoder"):
        open_checkpoint(FIXTURES / "bucketed" / "torch_dist").source.leaves()


def test_buckets_without_the_programs_arguments_are_refused():
    leaves = DistributedCheckpoint(FIXTURES / "bucketed" / "torch_dist").leaves()
    with pytest.raises(InputError, match="no argument expert_model_parallel_size"):
        megatron_buckets.with_states_by_name(leaves, None)


@pytest.mark.long
@pytest.mark.processes
def test_the_fixtures_are_what_megatron_core_writes_today(tmp_path):
    pytest.importorskip("megatron.core")
    scripts = Path(__file__).resolve().parents[2] / "experiments" / "checkpoints"
    for script, names in {
        "megatron_fixtures.py": ("float32", "bfloat16"),
        "megatron_distributed_fixtures.py": ("buckets", "buckets_experts"),
        "megatron_buckets_fixtures.py": ("bucketed", "bucketed_experts"),
    }.items():
        subprocess.run([sys.executable, scripts / script, tmp_path / "new"], check=True)
        for name in names:
            if name.startswith("bucketed"):
                assert_buckets_hold_what_its_ranks_held(tmp_path / "new" / name)
            else:
                assert_holds_what_its_ranks_held(tmp_path / "new" / name)


def test_buffers_of_other_weights_are_refused():
    folder = FIXTURES / "buckets" / "iter_0000003" / "mp_rank_00_000"
    content = load_torch(folder / megatron.FILE)
    weights = []
    for name, tensor in content["model"].items():
        if hasattr(tensor, "dtype"):
            weights.append(Weight((0, name), name, tensor))
    given = content["args"].state

    def read(weights, arguments):
        path = folder / megatron_buffers.FILE
        return list(buffered_states(path, weights, arguments, stage=0, num_stages=2))

    assert len(read(weights, given)) == 3 * len(weights)
    with pytest.raises(InputError, match="with buckets of 1000000 elements"):
        read(weights, given | {"ddp_bucket_size": 1_000_000})
    with pytest.raises(InputError, match="'1 buffers', expected one for each of"):
        read([*weights, Weight((1, "w"), "w", weights[0].tensor)], given)
    same = [number for number, weight in enumerate(weights) if weight.tensor.shape == (8, 8)]
    first, second = (weights[number] for number in same)
    weights[same[0]], weights[same[1]] = second, first
    with pytest.raises(InputError, match=r"the float32 master of decoder\.layers"):
        read(weights, given)


def test_its_distributed_format_is_read():
    folder = FIXTURES / "float32"
    leaves = open_checkpoint(folder / "torch_dist").source.leaves()
    for key, array in np.load(folder / "oracle.npz").items():
        np.testing.assert_array_equal(leaves[key][:], array, err_msg=key)


def test_states_of_other_weights_are_refused():
    weight = Weight("w", "w", np.zeros((2, 3)))
    group = {"wd_mult": 1.0, "params": [0]}
    for state in ({}, {0: {"step": 1}}):
        optimizer = {"param_groups": [group], "state": state or {1: {}}}
        with pytest.raises(InputError, match=r"states of \['w'\] in this order"):
            list(states_of(optimizer, [weight], "a file"))
