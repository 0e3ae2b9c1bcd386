"""`data` tells what a run will be trained on, and where documents end in its rows."""

import collections

import numpy as np
import pytest

from jaxscale import cli
from jaxscale.data.loader import DataConfig, make_loader
from jaxscale.data.sources import TextSource
from jaxscale.data.split import hash_text, is_held_out
from jaxscale.run.data import pieces_of, show_data
from tests.run import runs

LENGTH, BATCH = 32, 8  # of tests/tiny.gin, whose tokens are bytes


@pytest.fixture(scope="module")
def texts(gin_file):
    return [path.read_text() for path in (gin_file.parent / "corpus").iterdir()]


def test_figures_are_those_of_the_texts(gin_file, texts, tmp_path, capsys):
    run = runs.load_run(gin_file, tmp_path / "run")
    (figures,) = show_data(run=run)
    hidden = is_held_out([hash_text(text) for text in texts], 0.2)
    trained = [text for text, is_hidden in zip(texts, hidden, strict=True) if not is_hidden]
    assert figures.documents == len(trained) and figures.held_out == hidden.sum() > 0
    assert figures.bytes == sum(map(len, trained))
    assert figures.tokens == figures.bytes + len(trained)
    assert figures.predicted == figures.bytes
    assert figures.longer == sum(len(text) + 1 > LENGTH for text in trained)
    assert figures.copies == len(trained) - len(set(trained))
    assert figures.tokens <= figures.positions == figures.rows * LENGTH
    assert figures.served == runs.STEPS * BATCH
    printed = capsys.readouterr().out
    assert f"{figures.tokens / figures.positions:.2%}" in printed
    assert f"{figures.served / figures.rows:.2f}" in printed
    assert f"30 steps of 8 rows of 32 positions: {30 * 8 * 32:,}, of which" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_packed", [True, False])
def test_rows_are_cut_where_documents_end(tmp_path, is_packed):
    texts = ["one", "four 4", "seventeen letters"]
    for text in texts:
        (tmp_path / f"{text}.txt").write_text(text)
    data = DataConfig(
        sources=(TextSource((str(tmp_path),)),),
        sequence_length=8,
        batch_size=5,
        held_out_fraction=0.0,
        cache_directory=str(tmp_path / "cache"),
        is_packed=is_packed,
    )
    loader = make_loader(data)
    (num_rows,) = loader.rows_per_epoch
    batch = loader.batch_at(0)
    pieces = [piece for row in range(num_rows) for piece in pieces_of(batch, row)]
    ended = [piece for piece in pieces if piece.is_end]
    assert ended and all(piece.tokens[-1] == 256 for piece in ended)
    assert not any(256 in piece.tokens[: -1 if piece.is_end else None] for piece in pieces)
    letters = collections.Counter(np.concatenate([piece.tokens for piece in pieces]).tolist())
    assert letters == collections.Counter("".join(texts).encode()) + collections.Counter({256: 3})
    assert len(ended) == 3 and len(pieces) > 3


def test_the_verb_shows_borders_and_harmless_text(gin_file, tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"\x1b[2J{number}")
    overrides = [f"CORPUS=({str(tmp_path / 'corpus')!r},)", f"CACHE={str(tmp_path / 'cache')!r}"]
    overrides += [f"DIRECTORY={str(tmp_path / 'run')!r}", "num_rows=1", "batch=3"]
    assert cli.main(["data", str(gin_file), *(f"--set={each}" for each in overrides)]) == 0
    printed = capsys.readouterr().out
    assert "batch 3, row 0 of 8, source 0 TextSource" in printed
    assert "| document ends" in printed and r"\x1b[2J" in printed and "\x1b" not in printed


@pytest.mark.parametrize("override", ["batch=-1", "batch=30", "num_rows=-1", "num_characters=5"])
def test_bad_arguments_are_named(gin_file, tmp_path, capsys, override):
    overrides = [f"DIRECTORY={str(tmp_path / 'run')!r}", override]
    assert cli.main(["data", str(gin_file), *(f"--set={each}" for each in overrides)]) == 2
    assert override.split("=")[0] + ": given " in capsys.readouterr().err
