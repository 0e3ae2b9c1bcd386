"""What a training shows while it runs: a live bar, or plain lines where no terminal is."""

import datetime
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

SHOWN = {
    "loss": ("loss", "{:.3f}"),
    "reward": ("reward", "{:.3g}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "mfu": ("mfu", "{:.1%}"),
}
LINE_EVERY_S = 10.0  # a log is read later: a line a step would bury the rest


class StepTime:
    """Seconds a step takes on average, evaluations and saves included but no compilation.

    The first step and the first evaluation are compiled, so that they are left out.
    """

    def __init__(self):
        self._last, self._seen = time.monotonic(), set()
        self._seconds, self._num_steps = 0.0, 0

    def add(self, figures: Mapping[str, Any]) -> None:
        """Counts what was just reported: a step, or an evaluation."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        is_step = "loss" in figures
        if is_step in self._seen:
            self._seconds += seconds
            self._num_steps += is_step
        self._seen.add(is_step)

    @property
    def mean(self) -> float:
        """Seconds a step; 0 while it is not known."""
        return self._seconds / self._num_steps if self._num_steps else 0.0


class ProgressBar(tqdm):
    """A live line: steps, time left, speed, and the newest figures.

    Args:
        steps: of the whole run.
        step: finished ones.
    """

    def __init__(self, steps: int, step: int):
        self._step_time, self._shown = StepTime(), {}
        super().__init__(total=steps, initial=step, unit="step", dynamic_ncols=True, desc="train")

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm writes, with a rate of ours, from which it reckons the time that is left."""
        mean = self._step_time.mean
        return super().format_dict | {"rate": 1 / mean if mean else 0}

    def report(self, step: int, figures: Mapping[str, Any]) -> None:
        """Moves the bar and shows the newest figures."""
        self._step_time.add(figures)
        self._shown |= shown(figures)
        self.set_postfix(self._shown, refresh=False)
        self.update(step - self.n)


class Lines:
    """A line for the first step and the last, and between them one every ten seconds.

    Args:
        steps: of the whole run.
    """

    def __init__(self, steps: int):
        self._steps, self._step_time = steps, StepTime()
        self._due_at = 0.0

    def report(self, step: int, figures: Mapping[str, Any]) -> None:
        """Prints the figures of a step if a line is due."""
        self._step_time.add(figures)
        is_due = time.monotonic() >= self._due_at or step == self._steps
        if "loss" not in figures or not is_due:
            return
        self._due_at = time.monotonic() + LINE_EVERY_S
        parts = [f"{name} {text}" for name, text in shown(figures).items()]
        left_s = (self._steps - step) * self._step_time.mean
        if left_s:
            parts.append(f"{datetime.timedelta(seconds=round(left_s))} left")
        print(f"step {step} of {self._steps}: {', '.join(parts)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Every line has been written."""


def make_progress(steps: int, step: int) -> ProgressBar | Lines:
    """A bar where standard error is a terminal, else lines.

    Args:
        steps: of the whole run.
        step: finished ones.
    """
    return ProgressBar(steps, step) if sys.stderr.isatty() else Lines(steps)


def shown(figures: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a step that a line has room for, as text by name."""
    return {
        name: template.format(figures[key])
        for key, (name, template) in SHOWN.items()
        if key in figures
    }
