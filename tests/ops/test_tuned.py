"""Block sizes that were measured on a device are used there, and refused on another."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from jaxscale import cli
from jaxscale.kernels import device, tuning
from jaxscale.kernels.triton_call import Blocks, blocks_of, on_trial, operations
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.ops import tuned
from jaxscale.ops.device import kernel_family
from jaxscale.types import InputError

SLOW, FAST, TOO_LARGE = Blocks(64, 64), Blocks(128, 64), Blocks(256, 256)
OPERATIONS = "rms_norm", "paged_attention"


@pytest.fixture
def measured(monkeypatch):
    """`tune` measures two operations on an L4 on which one of three candidates does not fit.

    Returns the operations that it has measured.
    """
    seen = []

    def problem(operation):
        # What the blocks are is seen in the result of the compiled function.
        def run(x):
            return x + blocks_of(operation).rows

        candidates = SLOW, TOO_LARGE, FAST
        return tuning.Problem(operation, run, (jnp.int32(0),), candidates)

    def times(problem):
        seen.append(problem.operation)
        return measure(problem)

    def milliseconds(compiled, arguments):
        rows = int(compiled(*arguments))
        if rows == TOO_LARGE.rows:
            raise jax.errors.JaxRuntimeError("out of shared memory")
        return {SLOW.rows: 2.0, FAST.rows: 1.0}.get(rows, 4.0)

    measure = tuning.times
    monkeypatch.setattr(tuning, "problems", lambda: map(problem, OPERATIONS))
    monkeypatch.setattr(tuning, "times", times)
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(device, "device_kind", lambda: "NVIDIA L4")
    return seen


@pytest.fixture
def file(measured, tmp_path):
    """What `tune` wrote."""
    path = tmp_path / "blocks.json"
    tuned.tune(str(path))
    yield path
    tuned.use_tuned(None)


def test_tune_tells_how_far_it_is_and_what_the_package_has(measured, tmp_path, capsys):
    tuned.tune(str(tmp_path / "blocks.json"))
    first, second = capsys.readouterr().out.splitlines()
    of = len(operations())
    took = "1.000 ms, by the package's    4.000"
    assert re.match(rf" 1 of {of}: rms_norm +{took}  {{'rows': 128, 'columns': 64,", first)
    assert second.startswith(f" 2 of {of}: paged_attention ")


def test_a_process_with_block_sizes_of_its_own_keeps_them_and_tells_the_package_s(
    file, measured, tmp_path, capsys
):
    """Here FAST, which are one of the candidates too."""
    tuned.use_tuned(str(file))
    capsys.readouterr()
    tuned.tune(str(tmp_path / "again.json"))
    first, second = capsys.readouterr().out.splitlines()
    took = "1.000 ms, by the package's    4.000"
    assert took in first and took in second
    assert [blocks_of(each) for each in OPERATIONS] == [FAST, FAST]


def test_a_trial_of_one_operation_leaves_the_blocks_of_others(file):
    tuned.use_tuned(str(file))
    with on_trial("rms_norm", SLOW):
        assert [blocks_of(each) for each in OPERATIONS] == [SLOW, FAST]
    assert [blocks_of(each) for each in OPERATIONS] == [FAST, FAST]


def test_block_sizes_that_cannot_be_tried_leave_those_of_before(file, monkeypatch):
    tuned.use_tuned(str(file))

    def refuse(x):
        raise ValueError("no such tile")

    problem = tuning.Problem("rms_norm", refuse, (jnp.int32(0),), (SLOW,))
    with pytest.raises(ValueError, match="no such tile"):
        tuning.compiled_with(problem)
    assert blocks_of("rms_norm") == FAST


def test_package_s_block_sizes_that_do_not_run_here_are_told(
    measured, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tuning, "package_blocks", lambda operation: TOO_LARGE)
    monkeypatch.setattr(tuned, "package_blocks", lambda operation: TOO_LARGE)
    tuned.tune(str(tmp_path / "blocks.json"))
    for line in capsys.readouterr().out.splitlines():
        assert "1.000 ms, the package's do not run here  {'rows': 128," in line


def test_a_tune_that_was_cut_goes_on(file, measured, monkeypatch, capsys):
    whole = file.read_text()
    file.unlink()
    measured.clear()
    times = tuning.times

    def cut(problem):
        if measured:
            raise KeyboardInterrupt
        return times(problem)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tuning, "times", cut)
        tuned.tune(str(file))
    assert measured == ["rms_norm"]
    tuned.tune(str(file))
    assert measured == ["rms_norm", "paged_attention"]
    assert file.read_text() == whole
    assert f"{file} has 1 of {len(operations())} operations" in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_of_another_device_is_not_gone_on_with(file, measured, monkeypatch):
    monkeypatch.setattr(device, "device_kind", lambda: "NVIDIA A10")
    measured.clear()
    message = "a new file, or one of NVIDIA A10, but it is of NVIDIA L4"
    with pytest.raises(InputError, match=f"^output: given .*blocks.json.*, expected {message}"):
        tuned.tune(str(file))
    assert not measured


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(measured, tmp_path):
    message = "expected a file that can be written: No such file or directory"
    with pytest.raises(InputError, match=f"^output: given .*{message}"):
        tuned.tune(str(tmp_path / "absent" / "blocks.json"))
    assert not measured


def test_what_tune_wrote_is_used(file, caplog):
    before = blocks_of("rms_norm")
    with caplog.at_level("INFO", logger="jaxscale"):
        apply_runtime(RuntimeConfig(block_sizes=str(file)), ".")
    assert f"block sizes: {file}, measured on NVIDIA L4" in caplog.text
    assert blocks_of("rms_norm") == FAST
    assert blocks_of("linear_cross_entropy") != FAST, "what the file lacks is the package's own"
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
        ({"device": "NVIDIA L4", "blocks": []}, "with a device and its blocks"),
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
