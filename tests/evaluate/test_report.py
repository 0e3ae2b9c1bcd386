"""What a finished run is held to, and what its picture is drawn from."""

import json

import pytest

from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.evaluate import report
from jaxscale.evaluate.ngram import NgramFigures
from jaxscale.types import RunError

DATA = DataConfig(sources=(TextSource(("unread",)),), sequence_length=8, batch_size=1)


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Writes the history of a run that ends with these bits per byte and these loads of its experts."""
    monkeypatch.setattr(
        report, "ngram_figures", lambda data: NgramFigures(byte_unigram=4.0, token_bigram=2.0)
    )

    def make(bits, loads):
        lines = [{"step": 1, "nll": 3.0, "load": [[1, 1]]}, {"step": 2, "nll": 2.0, "load": loads}]
        lines += [
            {"step": step, "held_out/bits_per_byte": value} for step, value in ((1, 9.0), (2, bits))
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path

    return make


def test_a_run_is_compared_by_its_last_figures(make_run):
    text = report.compare_with_ngrams(make_run(1.8, [[30, 10], [20, 20]]), DATA, margin=0.05)
    assert "this model 1.800 (10.0% below the bigram)" in text and "25.0% to 75.0%" in text


@pytest.mark.parametrize(
    ("bits", "loads"),
    [(1.95, [[1, 1]]), (1.8, [[1, 1], [2, 0]])],
    ids=["too close to the bigram", "an unused expert"],
)
def test_a_run_that_missed_what_was_expected_fails(make_run, bits, loads):
    with pytest.raises(
        RunError, match="expected at least 5% below the bigram and every expert used"
    ):
        report.compare_with_ngrams(make_run(bits, loads), DATA, margin=0.05)


def test_resumes_are_marked_and_the_first_start_is_not(make_run, monkeypatch):
    run, lines = make_run(1.8, [[1, 1]]), []
    (run / "starts.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    original = report.Figure.subplots

    def subplots(figure):
        axes = original(figure)
        monkeypatch.setattr(
            axes, "axvline", lambda step, **style: lines.append((step, style["label"]))
        )
        return axes

    monkeypatch.setattr(report.Figure, "subplots", subplots)
    report.plot_run(run, held_out="held_out/loss")
    assert (run / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert lines == [(1, "resumed")]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
