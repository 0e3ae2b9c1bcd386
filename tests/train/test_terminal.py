"""What a training shows: the bar of a terminal, the lines of a log, and the time that is left."""

import sys

import pytest

from jaxscale.train import terminal
from jaxscale.train.terminal import Lines, ProgressBar, make_progress

FIGURES = {"loss": 2.345678, "tokens_per_second": 12345.6, "mfu": 0.5, "gradient_norm": 1.0}


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def report(progress, clock, times):
    """Reports steps 1, 2, ... at the times; a text is an evaluation that ends then."""
    step = 0
    for time in times:
        clock[0] = float(time)
        step += not isinstance(time, str)
        progress.report(step, {"held_out/loss": 1.0} if isinstance(time, str) else FIGURES)


def test_the_bar_shows_step_figures_and_the_time_without_compilation(clock, capsys):
    """Compilations of 60 and 30 s are left out, a second evaluation of 4 s is not."""
    bar = ProgressBar(12, 0)
    report(bar, clock, [60, 62, "92", 94, "98"])
    assert bar.format_dict["rate"] == pytest.approx(2 / 8)
    bar.refresh()
    bar.close()
    shown = capsys.readouterr().err
    for part in ("3/12", "loss=2.346", "tokens/s=12,346", "mfu=50.0%", "<00:36"):
        assert part in shown
    assert "<?" in shown, "no time is said before the second step"


def test_a_log_has_a_line_every_ten_seconds(clock, capsys):
    assert isinstance(make_progress(30, 0), Lines), "standard error is no terminal here"
    report(Lines(30), clock, [60 + 4 * number for number in range(30)])
    first, second, *_, last = capsys.readouterr().err.splitlines()
    assert first == "step 1 of 30: loss 2.346, tokens/s 12,346, mfu 50.0%"
    assert second == "step 4 of 30: loss 2.346, tokens/s 12,346, mfu 50.0%, 0:01:44 left"
    assert last == "step 30 of 30: loss 2.346, tokens/s 12,346, mfu 50.0%"


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = make_progress(10, 4)
    bar.close()
    assert isinstance(bar, ProgressBar) and bar.n == 4
