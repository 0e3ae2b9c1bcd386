"""The `checkpoint` verb on a run's checkpoints and on another system's, which a run starts from."""

import numpy as np
import pytest

from jaxscale import cli
from jaxscale.checkpoint.native import NativeCheckpoint
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
    assert f"{len(params)} arrays are equal" in capsys.readouterr().out
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
