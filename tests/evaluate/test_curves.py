"""The picture of several runs: what is drawn of which, and what is refused."""

import json

import numpy as np
import pytest

from jaxscale import cli
from jaxscale.evaluate import curves


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs of 40 steps; the second was resumed, and has no bits per byte."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        lines = [{"step": n, "loss": 6.0, "nll": 5 - n / 20} for n in range(1, 41)]
        lines = [line | {"learning_rate": 0.01} for line in lines]
        lines.append({"step": 40, "held_out/loss": 3.25, "samples/0": "text"})
        if not number:
            lines.append({"step": 40, "held_out/bits_per_byte": 1.5})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
        starts = [0, 25] if number else [0]
        text = "".join(json.dumps({"step": step}) + "\n" for step in starts)
        (tmp_path / name / "starts.jsonl").write_text(text)
    return ("first", "second")


def drawn(monkeypatch, *words):
    """The panels by title and what is printed, of `jaxscale plot`."""
    figures = []
    save = curves.Figure.savefig
    monkeypatch.setattr(
        curves.Figure,
        "savefig",
        lambda figure, *args, **named: [figures.append(figure), save(figure, *args, **named)],
    )
    assert cli.main(["plot", *words]) == 0
    return {axes.get_title(loc="left"): axes for axes in figures[0].axes}


def test_runs_are_drawn_in_one_picture(runs, tmp_path, monkeypatch, capsys):
    panels = drawn(monkeypatch, *runs)
    assert capsys.readouterr().out == "curves of first, second: curves.png\n"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    labels = [text.get_text() for text in panels["Loss"].get_legend().get_texts()]
    assert labels == list(runs)
    means = [line for line in panels["Loss"].lines if line.get_label() in runs]
    np.testing.assert_allclose(means[1].get_ydata(), 5 - np.arange(1, 41) / 20, rtol=1e-6)
    resumed = [line for line in panels["Loss"].lines if line.get_marker() == "^"]
    assert [list(line.get_xdata()) for line in resumed] == [[], [25]]
    assert panels["Held out"].get_ylabel() == "nats per token", "one has no bits per byte"
    assert [line.get_ydata()[0] for line in panels["Held out"].lines] == [3.25, 3.25]
    assert panels["Learning rate"].lines[0].get_ydata()[0] == 0.01


def test_one_run_is_drawn_into_its_directory(runs, tmp_path, monkeypatch):
    panels = drawn(monkeypatch, runs[0])
    assert (tmp_path / "first" / "curves.png").exists()
    assert panels["Held out"].get_ylabel() == "bits per byte"


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    for directory, part in (("absent", "steps in its metrics.jsonl"), ("binary", "UTF-8")):
        assert cli.main(["plot", "first", directory]) == 2
        message = capsys.readouterr().err
        assert f"given '{directory}" in message and part in message
    assert cli.main(["plot", "first", "--set=output=a.doc"]) == 2
    assert "a file whose name ends with .png" in capsys.readouterr().err
