"""What a folder is taken for, and what its identity follows."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxscale.checkpoint.exports import export
from jaxscale.checkpoint.opening import open_checkpoint
from jaxscale.types import InputError

FIXTURES = Path(__file__).with_name("fixtures")


def test_a_trainers_folder_is_deepspeeds_though_it_has_weights_beside(tmp_path):
    shutil.copytree(FIXTURES / "deepspeed" / "zero_2", tmp_path / "trainer")
    weights = {"3.weight": np.zeros((7, 4), np.float32)}
    export(weights, tmp_path / "trainer", kind="safetensors", step=0, budget_bytes=1 << 20)
    opened = open_checkpoint(tmp_path / "trainer")
    assert opened.kind == "DeepSpeed"
    assert "exp_avg/3.weight" in opened.source.leaves()


def test_of_tags_that_are_numbers_the_latest_is_the_one_that_is_named(tmp_path):
    """One whose save was not finished has the larger number."""
    shutil.copytree(FIXTURES / "deepspeed" / "zero_2" / "step3", tmp_path / "300")
    (tmp_path / "500").mkdir()
    (tmp_path / "latest").write_text("300")
    opened = open_checkpoint(tmp_path)
    assert opened.kind == "DeepSpeed" and opened.path == tmp_path / "300"


def test_the_latest_iteration_may_be_a_distributed_checkpoint(tmp_path):
    shutil.copytree(FIXTURES / "torch" / "distributed", tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    opened = open_checkpoint(tmp_path)
    assert opened.kind == "PyTorch distributed" and opened.path.name == "iter_0000007"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    with pytest.raises(InputError, match="the number of an iteration"):
        open_checkpoint(tmp_path)


def test_the_identity_follows_every_file(tmp_path):
    shutil.copytree(FIXTURES / "torch" / "distributed", tmp_path / "source")
    first = open_checkpoint(tmp_path / "source").identity()
    assert open_checkpoint(tmp_path / "source").identity() == first
    with (tmp_path / "source" / "__1_0.distcp").open("ab") as file:
        file.write(b"more")
    assert open_checkpoint(tmp_path / "source").identity() != first


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is nothing"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "file").write_text("text")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="a step of jaxscale, a folder of steps"):
            open_checkpoint(path)


def per_rank(folder):
    np.savez(folder / "all.npz", w=np.arange(100.0))


@pytest.mark.parametrize(
    ("fixture", "file"),
    [
        ("deepspeed/zero_2/step3", "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("deepspeed/zero_1/step3_universal", "zero/1.weight/exp_avg.pt"),
        ("megatron/bfloat16/iter_0000003", "mp_rank_01_001/model_optim_rng.pt"),
        ("megatron/bucketed/torch_dist", "__1_0.distcp"),
        ("torch/distributed", "__1_0.distcp"),
        (None, "all.npz"),
    ],
)
def test_a_flipped_bit_of_another_system_is_named(tmp_path, fixture, file):
    """It would be another number, and nothing else: the archives' own checksums tell."""
    if fixture is None:
        per_rank(tmp_path)
    else:
        shutil.copytree(FIXTURES / fixture, tmp_path, dirs_exist_ok=True)
    opened = open_checkpoint(tmp_path)
    opened.check()
    with zipfile.ZipFile(tmp_path / file) as archive:  # of several in a file, the last
        stored = [name for name in archive.namelist() if "/data/" in name or ".npy" in name]
        values = max((archive.read(name) for name in stored), key=len)
    content = bytearray((tmp_path / file).read_bytes())
    content[content.rindex(values) + len(values) - 1] ^= 1
    (tmp_path / file).write_bytes(content)
    opened.source.leaves()
    with pytest.raises(InputError, match=f"{file}.*CRC-32.*it is damaged"):
        opened.check()


def test_a_list_of_leaves_of_another_form_is_named(tmp_path, saved_steps):
    saved_steps(tmp_path, 1)
    file = tmp_path / "1" / "state" / "_METADATA"
    file.write_text(file.read_text().replace('"key_metadata"', '"key_metadatb"'))
    with pytest.raises(InputError, match=r"1/state.*contents that its system writes"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["..", "a/../../b"])
def test_our_own_list_of_leaves_cannot_lead_out_of_the_step(tmp_path, saved_steps, name):
    saved_steps(tmp_path, 1)
    file = tmp_path / "1" / "state" / "_METADATA"
    file.write_text(file.read_text().replace('"key": "step"', f'"key": "{name}"'))
    with pytest.raises(InputError, match="names that cannot lead out of the folder"):
        open_checkpoint(tmp_path)
