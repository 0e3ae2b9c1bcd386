"""What we write for DeepSpeed; experiments/checkpoints/deepspeed_loads.py sees it load that."""

import numpy as np
import pytest

from jaxscale.checkpoint import deepspeed_writer
from jaxscale.checkpoint.deepspeed_writer import write_universal
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.checkpoint.opening import open_checkpoint
from jaxscale.checkpoint.torch_file import load_torch
from jaxscale.types import InputError
from tests.checkpoint.test_deepspeed import normal


def test_a_run_becomes_a_universal_folder(tmp_path, saved_run):
    folder, states = saved_run
    leaves = NativeCheckpoint(folder / "2").leaves()
    write_universal(leaves, tmp_path, step=2, piece_bytes=100, learning_rate=0.5)
    assert (tmp_path / "latest_universal").read_text() == "global_step2_universal"
    got = open_checkpoint(tmp_path).source.leaves()
    adam = states[2]["opt_state"][1][0]
    for name, path in {"embed": ("embed",), "layers.0.attention.q": None}.items():
        for state, tree in {
            "fp32": states[2]["params"],
            "exp_avg": adam.mu,
            "exp_avg_sq": adam.nu,
        }.items():
            wanted = tree["embed"] if path else tree["layers"]["0"]["attention"]["q"]
            np.testing.assert_array_equal(got[f"{state}/{name}"][:], np.asarray(wanted))
    assert len(got) == 6
    step = load_torch(tmp_path / "global_step2_universal" / "zero" / "embed" / "step.pt")
    assert step[()] == 2
    optimizer = load_torch(tmp_path / "global_step2_universal" / "zero" / "optimizer_state.pt")
    inner = optimizer["optimizer_state_dict"]["param_groups"]
    assert all(group == {"lr": 0.5} for group in (*optimizer["param_groups"], *inner))
    with pytest.raises(InputError, match="a folder that does not exist yet"):
        write_universal(leaves, tmp_path, step=2, piece_bytes=100)


def test_what_has_no_weights_or_half_its_moments_is_no_universal_folder(tmp_path):
    w = normal(2)
    with pytest.raises(InputError, match="leaves under params/ or fp32/"):
        write_universal({"w": w}, tmp_path, step=0, piece_bytes=100)
    half = {"fp32/a": w, "fp32/b": w, "exp_avg/a": w}
    with pytest.raises(InputError, match="'b', expected exp_avg of every parameter, or of none"):
        write_universal(half, tmp_path, step=0, piece_bytes=100)


def test_a_universal_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """What a killed process has left is neither taken for one nor in the way of the next."""
    weights = {f"fp32/{name}": np.ones(3, np.float32) for name in "ab"}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(deepspeed_writer, "_step", interrupt)
        write_universal(weights, tmp_path, step=3, piece_bytes=100)
    with pytest.raises(InputError, match="a folder of steps"):
        open_checkpoint(tmp_path)
    assert not list(tmp_path.glob("*_universal"))
    write_universal(weights, tmp_path, step=3, piece_bytes=100)
    assert open_checkpoint(tmp_path).source.leaves().keys() == weights.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "global_step3_universal",
        "latest_universal",
    ]


def interrupt(*_):
    raise KeyboardInterrupt


def test_one_moment_alone_is_not_adams(tmp_path):
    """Lion's would be taken for the first of Adam's."""
    leaves = {"params/w": np.ones(2), "opt_state/0/mu/w": np.ones(2)}
    with pytest.raises(InputError, match="both moments of Adam, or none"):
        write_universal(leaves, tmp_path, step=3, piece_bytes=100)


def test_two_arrays_do_not_become_one(tmp_path):
    leaves = {"params/a/w": np.ones(2), "params/a.w": np.zeros(2)}
    with pytest.raises(
        InputError, match=r"params/a\.w', expected one array that becomes fp32/a\.w"
    ):
        write_universal(leaves, tmp_path, step=3, piece_bytes=100)


def test_a_type_that_torch_files_do_not_have_is_named(tmp_path):
    leaves = {"params/w": np.ones(2, np.uint16)}
    with pytest.raises(InputError, match="type of an array: given 'uint16'"):
        write_universal(leaves, tmp_path, step=3, piece_bytes=100)


def test_a_name_cannot_lead_out_of_the_folder_that_is_written(tmp_path):
    for name in ("../w", "..", "a/b", "/w"):
        with pytest.raises(InputError, match="names of parameters that can be a folder's"):
            write_universal({f"fp32/{name}": normal(2)}, tmp_path, step=0, piece_bytes=100)
    assert not list(tmp_path.iterdir())
