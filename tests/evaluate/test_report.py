"""What a finished run is compared with, and what its pictures show."""

import json

import numpy as np
import pytest
from matplotlib.axes import Axes

from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.evaluate import report
from jaxscale.evaluate.ngram import NgramFigures
from jaxscale.types import RunError

DATA = DataConfig(sources=(TextSource(("unread",)),), sequence_length=8, batch_size=1)
NGRAMS = NgramFigures(byte_unigram=4.0, token_bigram=2.0)


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Writes the history of a run that ends with these bits per byte and these expert loads."""
    monkeypatch.setattr(report, "ngram_figures", lambda data: NGRAMS)

    def make(bits, loads):
        lines = [
            {"step": 1, "nll": 3.0, "load": [[1, 1]]},
            {"step": 2, "nll": 2.0, "load": loads},
            {"step": 1, "held_out/bits_per_byte": 9.0},
            {"step": 2, "held_out/bits_per_byte": bits},
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text)
        return tmp_path

    return make


def test_a_run_is_compared_by_its_last_figures(make_run):
    run = make_run(1.8, [[30, 10], [20, 20]])
    text = report.compare_with_ngrams(run, DATA, margin=0.05)
    assert "this model 1.800 (10.0% below the bigram)" in text
    assert "25.0% to 75.0%" in text


@pytest.mark.parametrize(
    ("bits", "loads"),
    [(1.95, [[1, 1]]), (1.8, [[1, 1], [2, 0]]), (None, [[1, 1]])],
    ids=["too close to the bigram", "an unused expert", "a loss that is not finite"],
)
def test_a_run_that_missed_what_was_expected_fails(make_run, bits, loads):
    run = make_run(bits, loads)
    message = "expected at least 5% below the bigram and every expert used"
    with pytest.raises(RunError, match=message):
        report.compare_with_ngrams(run, DATA, margin=0.05)


def test_resumes_are_marked_and_the_first_start_is_not(make_run, monkeypatch):
    run, marks = make_run(1.8, [[1, 1]]), []
    (run / "starts.jsonl").write_text('{"step": 0}\n{"step": 1}\n')

    def axvline(axes, step, *, label, **style):
        marks.append((step, label))

    monkeypatch.setattr(Axes, "axvline", axvline)
    report.plot_run(run, held_out="held_out/loss")
    assert marks == [(1, "resumed")]
    for name in ("loss", "experts"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_mean_of_a_falling_curve_does_not_trail_it():
    falling = np.linspace(5.0, 3.0, 40)
    np.testing.assert_allclose(report.running_mean(falling), falling)
    with_gap = np.where(np.arange(40) == 20, np.nan, 2.0)
    np.testing.assert_allclose(report.running_mean(with_gap), 2.0)
