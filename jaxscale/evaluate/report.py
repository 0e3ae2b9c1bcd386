"""Pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

SMOOTHING_STEPS = 10


def plot_losses(
    history: Sequence[Mapping[str, Any]], path: Path, *, held_out: str, starts: Sequence[int] = (),
    levels: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """Draws training and held-out loss by step, with every resume marked, as a PNG.

    Args:
        history: lines of `metrics.jsonl`; training lines have `nll` (nats a token), evaluations the key `held_out`.
        path: of the picture.
        held_out: key of the held-out loss, in nats a token.
        starts: finished steps at which the run was resumed.
        levels: name -> nats a token, drawn as level lines, such as a bigram's loss.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    train = np.array([(line["step"], line["nll"]) for line in history if "nll" in line])
    axes.plot(*train.T, color="#9dbad5", linewidth=0.8, label="training, each step")
    axes.plot(train[:, 0], _running_mean(train[:, 1]), color="#1f5a92", label=f"training, mean of {SMOOTHING_STEPS}")
    evaluations = np.array([(line["step"], line[held_out]) for line in history if held_out in line])
    if evaluations.size:
        axes.plot(*evaluations.T, "o-", color="#c4501b", markersize=4, label="held out")
    for number, step in enumerate(starts):
        axes.axvline(step, color="#444444", linestyle="--", linewidth=1, label=None if number else "resumed")
    for number, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, color="#777777", linestyle=(":", "-.")[number % 2], linewidth=1.2, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _running_mean(values: np.ndarray) -> np.ndarray:
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - SMOOTHING_STEPS, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)
