"""Block sizes that were measured on a device are used there, and refused on another."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from jaxscale import cli
from jaxscale.kernels import device, tuning
from jaxscale.kernels.triton_call import Blocks, blocks_of, operations
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.ops import tuned
from jaxscale.ops.device import kernel_family
from jaxscale.types import InputError

SLOW, FAST, TOO_LARGE = Blocks(64, 64), Blocks(128, 64), Blocks(256, 256)


@pytest.fixture
def file(tmp_path, monkeypatch, capsys):
    """Written by `tune` on an L4 on which one of three candidates does not fit."""

    def run(x):
        return x + blocks_of("rms_norm").rows

    def milliseconds(compiled, arguments):
        rows = int(compiled(*arguments))
        if rows == TOO_LARGE.rows:
            raise jax.errors.JaxRuntimeError("out of shared memory")
        return {SLOW.rows: 2.0, FAST.rows: 1.0}[rows]

    problem = tuning.Problem("rms_norm", run, (jnp.int32(0),), (SLOW, TOO_LARGE, FAST))
    monkeypatch.setattr(tuning, "problems", lambda: [problem])
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(device, "device_kind", lambda: "NVIDIA L4")
    path = tmp_path / "blocks.json"
    tuned.tune(str(path))
    assert "rms_norm" in capsys.readouterr().out
    yield path
    tuned.use_tuned(None)


def test_what_tune_wrote_is_used(file, caplog):
    before = blocks_of("rms_norm")
    with caplog.at_level("INFO", logger="jaxscale"):
        apply_runtime(RuntimeConfig(block_sizes=str(file)), ".")
    assert f"block sizes: {file}, measured on NVIDIA L4" in caplog.text
    assert blocks_of("rms_norm") == FAST
    assert blocks_of("paged_attention") != FAST, "what the file lacks is the package's own"
    assert kernel_family() == "xla"
    apply_runtime(RuntimeConfig(), ".")
    assert blocks_of("rms_norm") == before


def test_block_sizes_of_another_device_are_refused(file, monkeypatch):
    tuned.use_tuned(str(file))
    monkeypatch.setattr(device, "device_kind", lambda: "NVIDIA A10")
    message = "a file of this device, NVIDIA A10, but it is of NVIDIA L4: jaxscale tune writes one"
    with pytest.raises(InputError, match=f"RuntimeConfig.block_sizes: .*{message}"):
        kernel_family()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no JSON"),
        ("[]", "with a device and its blocks"),
        ({"device": "NVIDIA L4", "blocks": {"norm": {}}}, "its entry 'norm' is none"),
        ({"device": "NVIDIA L4", "blocks": {"rms_norm": {"rows": 1}}}, "its entry 'rms_norm'"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    path = tmp_path / "blocks.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=f"^RuntimeConfig.block_sizes: .*{message}"):
        tuned.use_tuned(str(path))


def test_without_a_gpu_nothing_is_tuned(tmp_path, capsys):
    assert cli.main(["tune", str(tmp_path / "blocks.json")]) == 2
    assert "expected a GPU of compute capability 8.0 or newer" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_operation_has_candidates_that_a_layout_can_have():
    """Tiles of a layout are of one or two blocks of 64 tokens and of a part of one."""
    names = {name.rstrip("0123456789.") for name in operations()}
    assert tuning._candidates().keys() == names
    for name, sizes in tuning._candidates().items():
        assert sizes.keys() == {field.name for field in dataclasses.fields(Blocks)}
        if "layout" in name:
            assert set(sizes["rows"]) <= {64, 128} and set(sizes["columns"]) <= {16, 32, 64}
