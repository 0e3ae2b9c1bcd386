"""What a folder is taken for, and what its identity follows."""

import shutil
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
