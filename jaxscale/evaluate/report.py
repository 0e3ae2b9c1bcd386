"""What a run came to: its loss curve, and how it stands beside counting baselines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxscale.data.loader import DataConfig
from jaxscale.evaluate.ngram import ngram_figures
from jaxscale.train.metrics import read_history
from jaxscale.types import RunError

SMOOTHING_STEPS = 10


def plot_run(directory: Path, *, held_out: str) -> None:
    """Draws `loss.png` from a run's `metrics.jsonl`; resumes are those of `starts.jsonl`."""
    starts = [json.loads(line)["step"] for line in (directory / "starts.jsonl").read_text().splitlines()]
    plot_losses(read_history(directory / "metrics.jsonl"), directory / "loss.png", held_out=held_out, starts=starts[1:])
    print(f"\nloss curve: {directory / 'loss.png'}   every step's figures: {directory / 'metrics.jsonl'}")


def compare_with_ngrams(directory: Path, data: DataConfig, *, margin: float) -> str:
    """A run's held-out bits per byte beside a byte unigram's and a token bigram's, and how its experts are used.

    Args:
        directory: of the run; its evaluator of BitsPerByte is called "held_out".
        data: as the run's.
        margin: the model must be at least this fraction below the bigram.
    Returns:
        Two lines of text.
    Raises:
        RunError: the model is not below the margin, or an expert got no token in the last step.
    """
    history, ngrams = read_history(directory / "metrics.jsonl"), ngram_figures(data)
    bits = [line["held_out/bits_per_byte"] for line in history if "held_out/bits_per_byte" in line][-1]
    loads = [line["load"] for line in history if "load" in line][-1]
    shares = [count / sum(layer) for layer in loads for count in layer]
    gain = 1 - bits / ngrams.token_bigram
    text = (
        f"held-out bits per byte: byte unigram {ngrams.byte_unigram:.3f}, Kneser-Ney bigram {ngrams.token_bigram:.3f}, "
        f"this model {bits:.3f} ({gain:.1%} below the bigram)\n"
        f"experts' shares of a step's tokens: {min(shares):.1%} to {max(shares):.1%}"
    )
    if gain < margin or min(shares) == 0:
        raise RunError(f"expected at least {margin:.0%} below the bigram and every expert used:\n{text}")
    return text


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
