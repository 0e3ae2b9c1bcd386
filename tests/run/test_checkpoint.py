"""The `checkpoint` verb on a run's checkpoints and on another system's, which a run starts from."""

import json
import shutil

import numpy as np
import pytest

from jaxscale import cli
from jaxscale.checkpoint import conversion
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.checkpoint.opening import open_checkpoint
from tests.run import runs

RULES = r"""
[[rule]]
match = 'params/layers/.*/(gate|up)'
cuts = [{axis = 'tensor', dim = 2}]

[[rule]]
match = 'params/embedding/tokens'
cuts = [{axis = 'tensor', dim = 0, size = 264}]

[[rule]]
match = 'params/(?!embedding/tokens)(?!.*/(gate|up)$).*'
kind = 'replicated'
"""


def run(*arguments):
    return cli.main(["checkpoint", *map(str, arguments)])


@pytest.fixture(scope="module")
def params(whole):
    """The parameters of the whole run's last checkpoint by path."""
    leaves = NativeCheckpoint(whole / "checkpoints" / str(runs.STEPS)).leaves()
    return {path: leaf[:] for path, leaf in leaves.items() if path.startswith("params/")}


@pytest.fixture
def ranks(params, tmp_path):
    """The parameters over two tensor ranks, in a folder of `.npz` files."""
    folder = tmp_path / "ranks"
    folder.mkdir()
    for rank in range(2):
        own = dict(params)
        for path, whole in params.items():
            if path.endswith(("/gate", "/up")):
                own[path] = np.split(whole, 2, axis=2)[rank]
        padded = np.pad(params["params/embedding/tokens"], ((0, 8), (0, 0)), constant_values=np.nan)
        own["params/embedding/tokens"] = np.split(padded, 2)[rank]
        np.savez(folder / f"tensor={rank}.npz", **own)
    (folder / "rules.toml").write_text(RULES)
    return folder


def test_a_run_starts_from_the_ranks_of_another_system(ranks, gin_file, params, tmp_path, capsys):
    run_file = tmp_path / "run.gin"
    run_file.write_text(f"include '{gin_file}'\nDIRECTORY = '{tmp_path}/new'\n")
    assert run("convert", ranks, tmp_path / "converted", "--run", run_file) == 0
    assert run("diff", ranks, tmp_path / "converted") == 0
    told = capsys.readouterr()
    assert "convert: 100%" in told.err
    assert f"{len(params)} arrays are equal" in told.out
    overrides = [f"train.init_from={str(tmp_path / 'converted')!r}", "train.steps=1"]
    runs.train(gin_file, tmp_path / "new", *overrides, "optimizer.warmup_steps=0")
    assert runs.losses(tmp_path / "new")[0] < 0.9 * 5.6  # that of a draw is log(264) = 5.58


def test_a_checkpoint_is_listed_shown_and_verified(whole, capsys):
    folder = whole / "checkpoints"
    assert run("ls", folder) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [str(folder / str(n)) for n in (25, 30)]
    assert run("show", folder) == 0
    shown = capsys.readouterr().out
    assert "params/embedding/tokens " in shown and "float32[264, 16]  16.50 KiB" in shown
    assert run("verify", folder) == 0
    assert "arrays are sound" in capsys.readouterr().out


def test_steps_beside_a_damaged_one_are_listed(whole, tmp_path, capsys):
    shutil.copytree(whole / "checkpoints", tmp_path / "steps")
    file = tmp_path / "steps" / "25" / "state" / "_METADATA"
    file.write_text(file.read_text()[:-9])
    assert run("ls", tmp_path / "steps") == 1
    printed = capsys.readouterr()
    damaged, sound = printed.out.splitlines()
    assert str(file) in damaged and "a sound list of leaves" in damaged
    assert sound.startswith(f"{tmp_path}/steps/30  jaxscale  ")
    assert "1 of 2 steps cannot be read" in printed.err


def test_differences_are_named_and_exit_1(whole, capsys):
    first, last = (whole / "checkpoints" / str(step) for step in (25, 30))
    assert run("diff", first, last) == 1
    printed = capsys.readouterr()
    assert "params/embedding/tokens: " in printed.out and "elements differ, by " in printed.out
    assert "jaxscale checkpoint: " in printed.err and "arrays differ" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "{0}/nothing"), "a checkpoint's folder; there is nothing"),
        (("show", "{0}"), "a step of jaxscale"),
        (("convert", "{1}", "{0}/new", "--budget", "4TB"), "bytes, or a number of KiB"),
        (("show", "{1}", "--rules", "{0}/none.toml"), "a TOML file"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, whole, capsys, arguments, message):
    checkpoints = whole / "checkpoints"
    assert run(*(each.format(tmp_path, checkpoints) for each in arguments)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("jaxscale checkpoint: ") and message in printed
    assert printed.count("\n") == 1


def test_a_source_that_is_not_the_runs_model_is_refused(ranks, gin_file, tmp_path, capsys):
    run_file = tmp_path / "run.gin"
    text = f"include '{gin_file}'\nDIRECTORY = '{tmp_path}/new'\nrun.FeedForwardConfig.dim = 64\n"
    run_file.write_text(
        f"from __gin__ import dynamic_registration\nfrom jaxscale import run\n{text}"
    )
    assert run("convert", ranks, tmp_path / "converted", "--run", run_file) == 2
    assert "leaf params/layers/0/" in capsys.readouterr().err
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("kind", ["npz", "safetensors", "deepspeed"])
def test_parameters_become_those_of_another_system(ranks, params, tmp_path, capsys, kind):
    """Read back they are the same; DeepSpeed's names have dots, and the state before them."""
    folder = tmp_path / kind
    assert run("convert", ranks, folder, "--to", kind, "--step", 3, "--budget", 20_000) == 0
    leaves = open_checkpoint(folder).source.leaves()
    assert len(leaves) == len(params)
    for path, whole in params.items():
        name = path
        if kind == "deepspeed":
            name = f"fp32/{path.removeprefix('params/').replace('/', '.')}"
        np.testing.assert_array_equal(leaves[name][()], whole, err_msg=path)


def test_a_model_that_is_there_is_not_overwritten(ranks, tmp_path, capsys):
    assert run("convert", ranks, tmp_path / "model", "--to", "safetensors") == 0
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert run("convert", ranks, tmp_path / "model", "--to", "safetensors", "--budget", 9999) == 2
    assert "model.safetensors', expected no weights there yet" in capsys.readouterr().err
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ([0.0, 1.0], [-0.0, 1.0], "1 of 2 elements differ, by 0 at most"),
        ([np.nan, 1.0, 2.0], [np.nan, 1.0, 5.0], "1 of 3 elements differ, by 3 at most"),
        ([np.nan, 1.0], [2.0, 1.0], "1 of 2 elements differ, by nan at most"),
        ([2**53, 1], [2**53 + 1, 1], "1 of 2 elements differ"),
    ],
)
def test_arrays_are_compared_bit_by_bit(tmp_path, capsys, one, other, message):
    for name, values in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "all.npz", w=values)
    assert run("diff", tmp_path / "one", tmp_path / "other") == 1
    assert f"w: {message}" in capsys.readouterr().out
    assert run("diff", tmp_path / "one", tmp_path / "one") == 0


@pytest.mark.parametrize("to", ["jaxscale", "npz"])
def test_a_lost_chunk_is_not_converted_as_zeros(whole, tmp_path, capsys, to):
    shutil.copytree(whole / "checkpoints" / "30", tmp_path / "30")
    next((tmp_path / "30" / "state" / "params.embedding.tokens").glob("[0-9]*")).unlink()
    assert run("convert", tmp_path, tmp_path / "new", "--to", to) == 2
    assert "params/embedding/tokens" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert run("diff", tmp_path, whole / "checkpoints" / "30") == 2


def test_rules_rename_whole_arrays_and_ours_have_none(whole, ranks, params, tmp_path, capsys):
    """They were passed over where a system's arrays are whole."""
    assert run("convert", ranks, tmp_path / "plain", "--to", "safetensors") == 0
    rules = tmp_path / "mine.toml"
    rules.write_text("[[rule]]\nmatch = 'params/(?P<rest>.*)'\nto = 'model/{rest}'\n")
    assert run("convert", tmp_path / "plain", tmp_path / "named", "--rules", rules) == 0
    leaves = open_checkpoint(tmp_path / "named").source.leaves()
    assert leaves.keys() == {path.replace("params/", "model/") for path in params}
    rules.write_text("[[rule]]\nmatch = 'params/embedding/.*'\n")
    assert run("show", tmp_path / "plain", "--rules", rules) == 2
    assert "exactly one rule that matches it" in capsys.readouterr().err
    assert run("show", whole / "checkpoints", "--rules", rules) == 2
    assert "a checkpoint of another system" in capsys.readouterr().err


def test_a_conversion_does_not_go_on_by_other_rules(ranks, tmp_path, capsys, monkeypatch):
    """Pieces that the first rules made would stay, of the same shapes."""
    rules = tmp_path / "mine.toml"
    rules.write_text(RULES)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(conversion, "_commit", killed)
        assert run("convert", ranks, tmp_path / "new", "--rules", rules) == 130
    rules.write_text(RULES.replace("dim = 2}", "dim = 2, is_strided = true}"))
    assert run("convert", ranks, tmp_path / "new", "--rules", rules) == 2
    assert "a half-done conversion of the same source" in capsys.readouterr().err
    rules.write_text(RULES)
    assert run("convert", ranks, tmp_path / "new", "--rules", rules) == 0


def test_moments_without_a_step_are_refused(whole, tmp_path, capsys):
    """Adam would take them for those of its first step, and that would be many times too long."""
    assert run("convert", whole / "checkpoints", tmp_path / "universal", "--to", "deepspeed") == 0
    assert (tmp_path / "universal" / "global_step30_universal").is_dir()
    options = ["--to", "deepspeed", "--step", "0"]
    assert run("convert", tmp_path / "universal", tmp_path / "other", *options) == 2
    assert "finished steps of at least 1" in capsys.readouterr().err


def test_a_run_goes_on_from_its_converted_checkpoint(whole, gin_file, tmp_path):
    """Its facts and its position in the data come along."""
    assert run("convert", whole / "checkpoints", tmp_path / "new" / "checkpoints") == 0
    step = tmp_path / "new" / "checkpoints" / str(runs.STEPS)
    for item in ("meta", "data"):
        own = whole / "checkpoints" / str(runs.STEPS) / item / "metadata"
        assert json.loads((step / item / "metadata").read_text()) == json.loads(own.read_text())
    file = tmp_path / "run.gin"
    file.write_text(f"include '{gin_file}'\nDIRECTORY = '{tmp_path}/new'\n")
    options = ["--run", file]
    assert run("convert", whole / "checkpoints", tmp_path / "checked", *options) == 0
    for item in ("meta", "data"):
        again = tmp_path / "checked" / str(runs.STEPS) / item / "metadata"
        own = whole / "checkpoints" / str(runs.STEPS) / item / "metadata"
        assert json.loads(again.read_text()) == json.loads(own.read_text())
    _, position = runs.restored(runs.load_run(gin_file, tmp_path / "new"), tmp_path / "new")
    assert position["batch"] == runs.STEPS
