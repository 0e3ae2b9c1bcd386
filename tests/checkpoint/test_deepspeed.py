"""DeepSpeed's own checkpoints, those of tensor and pipeline ranks, and damage."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxscale.checkpoint.deepspeed import DeepSpeedCheckpoint, find_tag
from jaxscale.checkpoint.opening import open_checkpoint
from jaxscale.checkpoint.patterns import Cut, Rule
from jaxscale.checkpoint.torch_file import load_torch
from jaxscale.checkpoint.torch_writer import save_torch
from jaxscale.types import InputError

FIXTURES = Path(__file__).with_name("fixtures") / "deepspeed"


def oracle(stage):
    """What DeepSpeed's own conversion made of the ranks' files."""
    return dict(np.load(FIXTURES / f"zero_{stage}" / "oracle.npz"))


def assert_equal(leaves, wanted):
    assert leaves.keys() == wanted.keys()
    for name, leaf in leaves.items():
        # A universal folder that was made of ZeRO 3 is flat.
        np.testing.assert_array_equal(leaf[:].reshape(wanted[name].shape), wanted[name])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_partitions_of_each_stage_make_up_what_deepspeed_makes_of_them(stage):
    leaves = open_checkpoint(FIXTURES / f"zero_{stage}" / "step3").source.leaves()
    assert_equal(leaves, oracle(stage))
    assert leaves["fp32/3.weight"].shape == (7, 4)
    part = leaves["exp_avg/3.weight"][2:5, 1:3]
    whole = oracle(stage)["exp_avg/3.weight"].reshape(7, 4)
    np.testing.assert_array_equal(part, whole[2:5, 1:3])


@pytest.mark.parametrize("name", ["experts_1", "experts_2", "stages_1"])
def test_experts_of_several_ranks_and_stages_are_read(name):
    """Experts have their numbers in the model; a tied embedding is the same on both stages.

    Frozen biases of each are in files of single layers and experts alone.
    """
    leaves = open_checkpoint(FIXTURES / name).source.leaves()
    assert_equal(leaves, dict(np.load(FIXTURES / name / "oracle.npz")))
    frozen = [path for path in leaves if leaves[path].dtype != np.float32]
    assert len(frozen) == (4 if name.startswith("experts") else 1)
    assert all(path.endswith("bias") for path in frozen)
    for file in (FIXTURES / name / "step3").glob("layer_*expert_*"):
        for expert, rounded in load_torch(file).items():
            own = leaves[f"fp32/{expert}"][:].astype(rounded.dtype)
            np.testing.assert_array_equal(own, rounded[:])


@pytest.mark.parametrize("stage", [1, 3])
def test_a_universal_folder_is_read_in_the_shapes_of_the_parameters(stage):
    opened = open_checkpoint(FIXTURES / f"zero_{stage}")  # `latest_universal` names it
    leaves = opened.source.leaves()
    assert opened.path.name == "step3_universal"
    assert_equal(leaves, oracle(stage))
    assert leaves["fp32/3.weight"].shape == (7, 4)


# Damage


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_missing_or_truncated_rank_is_named(tmp_path, stage):
    source = FIXTURES / f"zero_{stage}" / "step3"
    for rank, is_missing in itertools.product(range(3), (True, False)):
        folder = tmp_path / f"{rank}{is_missing}"
        shutil.copytree(source, folder)
        (file,) = folder.glob(f"*zero_pp_rank_{rank}_*_optim_states.pt")
        content = file.read_bytes()
        if is_missing:
            file.unlink()
        else:
            file.write_bytes(content[: len(content) // 2])
        named = rf"missing are \[{rank}\]" if is_missing else file.name
        with pytest.raises(InputError, match=named):
            open_checkpoint(folder).source.leaves()


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("experts_1", "step3/layer_0_expert_3_mp_rank_00_model_states.pt", "expert 3 of layer 0"),
        ("stages_1", "step3/layer_01-model_states.pt", "a file of layer 1"),
        ("zero_1", "step3_universal/zero/2.bias/exp_avg_sq.pt", "a file 2.bias/exp_avg_sq.pt"),
        ("zero_3", "step3_universal/zero/0.weight", "a file 0.weight/"),
    ],
)
def test_what_only_a_lost_file_had_is_missed(tmp_path, name, file, message):
    """Frozen parameters, states and whole parameters were left out without a word."""
    shutil.copytree(FIXTURES / name, tmp_path / name)
    lost = tmp_path / name / file
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / name).source.leaves()


def test_a_layer_without_a_file_is_told(tmp_path, caplog):
    """It may be a function; a frozen layer that is lost is named by nothing else."""
    shutil.copytree(FIXTURES / "stages_1" / "step3", tmp_path / "step")
    assert len(DeepSpeedCheckpoint(tmp_path / "step").leaves()) == 13
    assert not caplog.records
    frozen = tmp_path / "step" / "layer_04-model_states.pt"
    shutil.copy(tmp_path / "step" / "layer_02-model_states.pt", frozen)
    leaves = DeepSpeedCheckpoint(tmp_path / "step").leaves()
    assert {"fp32/4.weight", "fp32/4.bias"} <= leaves.keys()
    (record,) = caplog.records
    assert "layers [3]: they are functions, or lost" in record.getMessage()


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("*mp_rank_0[23]_*", r"files of 4 model-parallel ranks; missing are \[2, 3\]"),
        ("*mp_rank_0[23]_optim_*", "a file mp_rank_02_optim_states.pt"),
        ("zero_pp_rank_1_mp_rank_01_model_*", r"of mp_rank_01 of data ranks \[0, 1, 2\]"),
    ],
)
def test_a_lost_stage_is_missed(tmp_path, lost, message):
    """What is left would look whole; of frozen parameters each model file has a part."""
    write_zero_3(tmp_path / "step", INFO)
    for path in (tmp_path / "step").glob(lost):
        path.unlink()
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "step").source.leaves()


def test_a_rank_without_its_moments_is_named(tmp_path):
    write_zero_3(tmp_path / "step", INFO)
    file = tmp_path / "step" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = load_torch(file)
    content["optimizer_state_dict"]["optimizer_state_dict"]["state"] = {}
    arrays = content["optimizer_state_dict"]["fp32_flat_groups"]
    content["optimizer_state_dict"]["fp32_flat_groups"] = [flat[:] for flat in arrays]
    file.unlink()
    save_torch(file, content, piece_bytes=100)
    with pytest.raises(InputError, match=r"data rank 1: given \['exp_avg', 'fp32'\]"):
        open_checkpoint(tmp_path / "step").source.leaves()


def test_contents_of_another_kind_are_named(tmp_path):
    """A model file under an optimizer's name."""
    shutil.copytree(FIXTURES / "zero_1" / "step3", tmp_path / "step")
    (optimizer, *_) = sorted((tmp_path / "step").glob("*_optim_states.pt"))
    shutil.copy(tmp_path / "step" / "mp_rank_00_model_states.pt", optimizer)
    with pytest.raises(InputError, match="contents that its system writes"):
        open_checkpoint(tmp_path / "step").source.leaves()


def write_atom(folder, param, shape):
    """A universal folder of one parameter, whose model file gives it a shape."""
    (folder / "zero" / "w").mkdir(parents=True)
    save_torch(folder / "zero" / "w" / "fp32.pt", param, piece_bytes=100)
    model = {"param_shapes": [{"w": shape}]}
    save_torch(folder / "mp_rank_00_model_states.pt", model, piece_bytes=100)


def test_a_universal_vocabulary_has_no_padding(tmp_path):
    """Its model's has; the shape of another matrix is an error, not another order of numbers."""
    w = normal(5, 2)
    write_atom(tmp_path / "cut", {"param": w, "vocab_tensor": True}, (6, 2))
    leaves = open_checkpoint(tmp_path / "cut").source.leaves()
    np.testing.assert_array_equal(leaves["fp32/w"][:], w)
    write_atom(tmp_path / "other", {"param": w}, (2, 5))
    with pytest.raises(InputError, match=r"\(5, 2\), expected a tensor of shape \(2, 5\)"):
        open_checkpoint(tmp_path / "other").source.leaves()
    write_atom(tmp_path / "none", {"cat_dim": 0}, (2, 5))
    with pytest.raises(InputError, match="a file with a tensor"):
        open_checkpoint(tmp_path / "none").source.leaves()


def test_ranks_of_another_checkpoint_are_refused(tmp_path):
    shutil.copytree(FIXTURES / "zero_1" / "step3", tmp_path / "mixed")
    files = sorted((tmp_path / "mixed").glob("*_optim_states.pt"))
    shutil.copy(files[0], files[1])
    with pytest.raises(InputError, match="each element written exactly once"):
        open_checkpoint(tmp_path / "mixed").source.leaves()


def test_a_file_that_is_not_read_is_refused(tmp_path):
    folder = tmp_path / "without_zero"
    shutil.copytree(FIXTURES / "zero_1" / "step3", folder)
    name = "expp_rank_0_mp_rank_00_optim_states.pt"
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / name)
    with pytest.raises(InputError, match=f"{name}.*this one is not read"):
        open_checkpoint(folder).source.leaves()


def test_latest_cannot_lead_out_of_its_folder(tmp_path):
    for tag in ("../../elsewhere", "..", "/etc"):
        (tmp_path / "latest").write_text(tag)
        with pytest.raises(InputError, match="the name of a folder beside it"):
            find_tag(tmp_path)


# Tensor and pipeline ranks, in files that this test lays out as DeepSpeed does


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


WHOLE = {
    "embed.weight": normal(10, 6),  # padded to 12 rows
    "0.qkv.weight": normal(16, 6, seed=1),  # q of 8 rows, k and v of 4
    "0.out.weight": normal(6, 8, seed=2),
    "0.gate_up.weight": normal(8, 6, seed=3),
    "0.norm.weight": normal(6, seed=4),
    "0.router.weight": normal(4, 6, seed=5),
}
INFO = {
    "universal_checkpoint_version": 0.2,
    "original_vocab_size": 10,
    "vocabulary_parameter_patterns": [r"embed\.weight"],
    "pipeline_replicated_parameter_patterns": [r"embed\.weight"],
    "tp_replicated_parameter_patterns": [r".*norm\.weight"],
    "parameter_to_average_patterns": [r".*router\.weight"],
    "parameter_with_row_parallelism_patterns": [r".*out\.weight"],
    "parameter_with_2_sub_params_cat_dim_0": [r".*gate_up"],
    "parameter_with_sub_params": [
        {"patterns": [r".*qkv\.weight"], "shape": [(8, 4, 4), 6], "partition_dim": 0}
    ],
}
NUM_TENSOR, NUM_STAGES = 2, 2


def part_of(name, whole, tensor):
    """What one of two tensor ranks holds."""
    if name == "embed.weight":
        return np.split(np.pad(whole, ((0, 2), (0, 0))), 2)[tensor]
    if name == "0.qkv.weight":
        return np.concatenate([np.split(block, 2)[tensor] for block in np.split(whole, [8, 12])])
    if name == "0.gate_up.weight":
        return np.concatenate([np.split(block, 2)[tensor] for block in np.split(whole, 2)])
    if name == "0.out.weight":
        return np.split(whole, 2, axis=1)[tensor]
    if name == "0.router.weight":
        return whole + np.float32([-1, 1][tensor])  # two that went apart; their mean is the whole
    return whole


def write_zero_3(folder, info, num_data=3, changed=lambda name, part, ranks: part):
    """A checkpoint of ZeRO 3 within 2 tensor by 2 pipeline ranks; both stages hold the embedding"""
    folder.mkdir()
    for stage, tensor in itertools.product(range(NUM_STAGES), range(NUM_TENSOR)):
        names = ["embed.weight"] if stage else list(WHOLE)
        parts = {name: part_of(name, WHOLE[name], tensor) for name in names}
        parts = {name: changed(name, part, (stage, tensor)) for name, part in parts.items()}
        number = stage * NUM_TENSOR + tensor
        model = {
            "param_shapes": [{name: part.shape for name, part in parts.items()}],
            "checkpoint_parallel_dimensions": {"tp_degree": NUM_TENSOR, "pp_degree": NUM_STAGES},
        }
        model |= {"universal_checkpoint_info": info} if info else {}
        for data in range(num_data):
            flat = []
            for part in parts.values():
                size = -(-part.size // num_data)
                padded = np.pad(part.reshape(-1), (0, size * num_data - part.size))
                flat.append(np.split(padded, num_data)[data])
            flat = np.concatenate(flat)
            optimizer = {
                "partition_count": num_data,
                "fp32_flat_groups": [flat],
                "optimizer_state_dict": {"state": {0: {"exp_avg": flat * np.float32(2)}}},
            }
            name = f"zero_pp_rank_{data}_mp_rank_{number:02d}"
            content = {"optimizer_state_dict": optimizer}
            save_torch(folder / f"{name}_optim_states.pt", content, piece_bytes=100)
            save_torch(folder / f"{name}_model_states.pt", model, piece_bytes=100)


def test_its_patterns_say_how_tensor_and_pipeline_ranks_hold_parameters(tmp_path):
    write_zero_3(tmp_path / "step", INFO)
    leaves = open_checkpoint(tmp_path / "step").source.leaves()
    assert len(leaves) == 2 * len(WHOLE)
    for name, whole in WHOLE.items():
        np.testing.assert_allclose(leaves[f"fp32/{name}"][:], whole, rtol=1e-6, err_msg=name)
        moment = leaves[f"exp_avg/{name}"][:]
        np.testing.assert_allclose(moment, 2 * whole, rtol=1e-6, err_msg=name)


def test_a_frozen_layer_is_whole_over_its_tensor_ranks(tmp_path):
    """Half of it would look like a smaller layer."""
    write_zero_3(tmp_path / "step", INFO)
    frozen = normal(8, 6, seed=6)
    for rank, part in enumerate(np.split(frozen, 2)):
        for layer, held in enumerate(({}, {"weight": part})):
            path = tmp_path / "step" / f"layer_0{layer}-model_0{rank}-model_states.pt"
            save_torch(path, held, piece_bytes=100)
    leaves = DeepSpeedCheckpoint(tmp_path / "step").leaves()
    np.testing.assert_array_equal(leaves["fp32/1.weight"][:], frozen)
    path.unlink()
    with pytest.raises(InputError, match=r"1.weight of .*; missing are \[1\]"):
        DeepSpeedCheckpoint(tmp_path / "step").leaves()


def test_patterns_are_strict(tmp_path):
    write_zero_3(tmp_path / "without", None)
    with pytest.raises(InputError, match="universal_checkpoint_info in its model states, or rules"):
        open_checkpoint(tmp_path / "without").source.leaves()
    unused = INFO | {"parameter_to_average_patterns": [r".*router\.weight", "nothing"]}
    write_zero_3(tmp_path / "unused", unused)
    with pytest.raises(InputError, match="'nothing', expected a pattern that matches"):
        open_checkpoint(tmp_path / "unused").source.leaves()
    twice = INFO | {"tp_replicated_parameter_patterns": [r".*norm\.weight", ".*out"]}
    write_zero_3(tmp_path / "twice", twice)
    with pytest.raises(InputError, match=r"0.out.weight: .*one list of patterns"):
        open_checkpoint(tmp_path / "twice").source.leaves()


def test_replicas_that_differ_are_named_with_their_ranks(tmp_path):
    def changed(name, part, ranks):
        return part + 1 if name == "0.norm.weight" and ranks == (0, 1) else part

    write_zero_3(tmp_path / "step", INFO, changed=changed)
    leaves = open_checkpoint(tmp_path / "step").source.leaves()
    message = "0.norm.weight of rank pipeline=0, tensor=0 and .* pipeline=0, tensor=1"
    with pytest.raises(InputError, match=message):
        leaves["fp32/0.norm.weight"][:]


def test_a_rank_that_owns_nothing_is_no_hole(tmp_path):
    """Of two numbers over three ranks the last has padding alone."""
    w = np.float32([1, 2])
    (tmp_path / "step").mkdir()
    for data, flat in enumerate((w[:1], w[1:], np.float32([0]))):
        states = {"exp_avg": flat * 2}
        optimizer = {
            "partition_count": 3,
            "fp32_flat_groups": [flat],
            "optimizer_state_dict": {"state": {0: states}},
        }
        name = f"zero_pp_rank_{data}_mp_rank_00"
        content = {"optimizer_state_dict": optimizer}
        save_torch(tmp_path / "step" / f"{name}_optim_states.pt", content, piece_bytes=100)
        model = {"param_shapes": [{"w": (2,)}]}
        save_torch(tmp_path / "step" / f"{name}_model_states.pt", model, piece_bytes=100)
    leaves = open_checkpoint(tmp_path / "step").source.leaves()
    np.testing.assert_array_equal(leaves["fp32/w"][:], w)
    np.testing.assert_array_equal(leaves["exp_avg/w"][:], 2 * w)


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("deepspeed_fixtures.py", ("zero_1", "zero_2", "zero_3")),
        ("deepspeed_rank_fixtures.py", ("experts_1", "experts_2", "stages_1")),
    ],
)
def test_the_fixtures_are_what_deepspeed_writes_today(tmp_path, script, names):
    pytest.importorskip("deepspeed")
    path = Path(__file__).resolve().parents[2] / "experiments" / "checkpoints" / script
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, path, tmp_path / "new"], env=environment, check=True)
    for name in names:
        leaves = open_checkpoint(tmp_path / "new" / name / "step3").source.leaves()
        assert_equal(leaves, dict(np.load(tmp_path / "new" / name / "oracle.npz")))


def test_rules_of_ones_own_replace_the_patterns(tmp_path):
    write_zero_3(tmp_path / "step", None)
    names = "|".join(name for name in WHOLE if name not in ("embed.weight", "0.qkv.weight"))
    rules = (
        Rule(r"embed\.weight", cuts=(Cut("tensor", 0, size=10),), kind="replicated"),
        Rule(r"0\.qkv\.weight", to="qkv", cuts=(Cut("tensor", 0, blocks=(8, 4, 4)),)),
        Rule(names, cuts=(Cut("tensor", 0),)),
    )
    leaves = DeepSpeedCheckpoint(tmp_path / "step", rules).leaves()
    np.testing.assert_array_equal(leaves["fp32/qkv"][:], WHOLE["0.qkv.weight"])
