"""Curves of one run or several, side by side: loss, held-out figures and learning rate by step."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxscale.evaluate.report import SMOOTHING_STEPS, Lines, curve, running_mean
from jaxscale.train.metrics import HISTORY, read_history
from jaxscale.types import InputError

# Paul Tol's bright scheme, which readers who see few colours can tell apart.
COLORS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#aa3377",
    "#ccbb44",
    "#66ccee",
    "#555555",
)
INK, FAINT = "#333333", "#dddddd"
UNITS = {"loss": "nats per token", "bits_per_byte": "bits per byte"}
PLACES = [["loss", "loss"], ["held out", "rate"]]
DASHES = ("-", "--", ":")  # of the evaluators of a run
DOTS = {"markersize": 5, "markeredgecolor": "white"}
CAPTION = f"line: mean of {SMOOTHING_STEPS} steps    dot: held out    triangle: resumed"
MAX_NAME = 40  # characters; a longer name is cut at its beginning


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """What a run has left of its training.

    Args:
        name: of the run in the picture.
        lines: of `metrics.jsonl`.
        resumes: finished steps at which it was started again.
    """

    name: str
    lines: Lines
    resumes: tuple[int, ...]

    def training(self) -> np.ndarray:
        """[n, 2]: step and loss, in nats a token where the loss has other terms too."""
        of_tokens = curve(self.lines, "nll")
        return of_tokens if of_tokens.size else curve(self.lines, "loss")

    def evaluated(self, figure: str) -> dict[str, np.ndarray]:
        """[n, 2] by evaluator: step and figure."""
        names = dict.fromkeys(name for line in self.lines for name in line)
        found = [name for name in names if name.endswith(f"/{figure}")]
        return {name.removesuffix(f"/{figure}"): curve(self.lines, name) for name in found}


def read_run(directory: Path) -> RunHistory:
    """The history in a run's directory.

    Raises:
        InputError: there is none, or it has no step yet.
    """
    lines = read_history(directory / HISTORY)
    if not lines:
        expected = "the directory of a run, with steps in its metrics.jsonl"
        raise InputError("runs", str(directory), expected)
    starts = directory / "starts.jsonl"
    texts = starts.read_text().splitlines() if starts.exists() else []
    resumes = tuple(json.loads(text)["step"] for text in texts[1:])
    return RunHistory(str(directory), lines, resumes)


def draw_runs(runs: Sequence[RunHistory], path: Path) -> None:
    """Draws runs into one picture.

    Args:
        runs: each has a colour, the same in every panel.
        path: of the picture; its ending says of which kind, such as .png or .svg.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplot_mosaic(PLACES, height_ratios=(3, 2), sharex=True)
    have_bytes = all(run.evaluated("bits_per_byte") for run in runs)
    held_out = "bits_per_byte" if have_bytes else "loss"
    for number, run in enumerate(runs):
        color = COLORS[number % len(COLORS)]
        _draw_loss(panels["loss"], run, color)
        _draw_held_out(panels["held out"], run, held_out, color)
        rates = curve(run.lines, "learning_rate")
        if rates.size:
            panels["rate"].plot(*rates.T, color=color, linewidth=1.5)
    _finish(panels["loss"], "Loss", UNITS["loss"])
    _finish(panels["held out"], "Held out", UNITS[held_out])
    _finish(panels["rate"], "Learning rate", "")
    panels["loss"].set_title(CAPTION, loc="right", color=INK, fontsize="small")
    panels["loss"].legend(loc="upper right", frameon=False, labelcolor="linecolor")
    figure.savefig(path, dpi=150)


def _draw_loss(axes: Axes, run: RunHistory, color: str) -> None:
    """Each step behind its running mean, what is held out as dots, and where it was resumed."""
    label = run.name
    if len(label) > MAX_NAME:
        label = f"...{label[3 - MAX_NAME :]}"
    steps, losses = run.training().T
    axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.7)
    axes.plot(
        steps,
        running_mean(losses),
        color=color,
        linewidth=1.8,
        label=label,
    )
    for points in run.evaluated("loss").values():
        axes.plot(*points.T, "o", color=color, **DOTS)
    axes.plot(
        run.resumes,
        np.full(len(run.resumes), 0.02),
        "^",
        color=color,
        transform=axes.get_xaxis_transform(),
    )


def _draw_held_out(
    axes: Axes,
    run: RunHistory,
    figure: str,
    color: str,
) -> None:
    """A line for each evaluator, and its last figure."""
    for number, points in enumerate(run.evaluated(figure).values()):
        dash = DASHES[number % len(DASHES)]
        axes.plot(*points.T, dash, marker="o", color=color, **DOTS)
        axes.annotate(
            f"{points[-1, 1]:.3f}",
            points[-1],
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize="small",
        )


def _finish(axes: Axes, title: str, unit: str) -> None:
    """Title, unit, a light grid, and no more ink than that."""
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=0, labelbottom=True)
    axes.margins(x=0.06)
