"""What a run came to: its loss curve, and how it stands beside counting baselines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxscale.data.loader import DataConfig
from jaxscale.evaluate.ngram import ngram_figures
from jaxscale.train.metrics import expert_use, read_history
from jaxscale.types import RunError

SMOOTHING_STEPS = 10


def plot_run(directory: Path, *, held_out: str) -> None:
    """Draws `loss.png`, and `experts.png` of a mixture of experts, from a run's `metrics.jsonl`; resumes are those of
    `starts.jsonl`."""
    starts = [
        json.loads(line)["step"] for line in (directory / "starts.jsonl").read_text().splitlines()
    ]
    history = read_history(directory / "metrics.jsonl")
    plot_losses(history, directory / "loss.png", held_out=held_out, starts=starts[1:])
    if any("load" in line for line in history):
        plot_experts(history, directory / "experts.png")
    print(
        f"\nloss curve: {directory / 'loss.png'}   every step's figures: {directory / 'metrics.jsonl'}"
    )


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
    bits = [line["held_out/bits_per_byte"] for line in history if "held_out/bits_per_byte" in line][
        -1
    ]
    loads = [line["load"] for line in history if "load" in line][-1]
    shares = [count / sum(layer) for layer in loads for count in layer]
    gain = 1 - bits / ngrams.token_bigram
    text = (
        f"held-out bits per byte: byte unigram {ngrams.byte_unigram:.3f}, Kneser-Ney bigram {ngrams.token_bigram:.3f}, "
        f"this model {bits:.3f} ({gain:.1%} below the bigram)\n"
        f"experts' shares of a step's tokens: {min(shares):.1%} to {max(shares):.1%}"
    )
    if gain < margin or min(shares) == 0:
        raise RunError(
            f"expected at least {margin:.0%} below the bigram and every expert used:\n{text}"
        )
    return text


def plot_losses(
    history: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    held_out: str,
    starts: Sequence[int] = (),
    levels: Mapping[str, float] | None = None,
) -> None:
    """Draws training and held-out loss by step, with every resume marked, as a PNG.

    Args:
        history: lines of `metrics.jsonl`; training lines have `nll` (nats a token), evaluations the
            key `held_out`.
        path: of the picture.
        held_out: key of the held-out loss, in nats a token.
        starts: finished steps at which the run was resumed.
        levels: name -> nats a token, drawn as level lines, such as a bigram's loss.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    train = np.array([(line["step"], line["nll"]) for line in history if "nll" in line])
    axes.plot(*train.T, color="#9dbad5", linewidth=0.8, label="training, each step")
    axes.plot(
        train[:, 0],
        _running_mean(train[:, 1]),
        color="#1f5a92",
        label=f"training, mean of {SMOOTHING_STEPS}",
    )
    evaluations = np.array([(line["step"], line[held_out]) for line in history if held_out in line])
    if evaluations.size:
        axes.plot(*evaluations.T, "o-", color="#c4501b", markersize=4, label="held out")
    for number, step in enumerate(starts):
        axes.axvline(
            step, color="#444444", linestyle="--", linewidth=1, label=None if number else "resumed"
        )
    for number, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(
            level, color="#777777", linestyle=(":", "-.")[number % 2], linewidth=1.2, label=name
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_experts(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws how evenly a mixture's experts are used, as a PNG: by step, and each expert's share in the last step.

    Args:
        history: lines of `metrics.jsonl`; training lines have `load` [layers, E].
        path: of the picture.
    """
    lines = [line for line in history if "load" in line]
    shares = np.array(lines[-1]["load"], float)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(9, 4), layout="constrained")
    by_step, by_expert = (figure.add_subplot(1, 2, place) for place in (1, 2))
    steps = [line["step"] for line in lines]
    use = [expert_use(np.asarray(line["load"])) for line in lines]
    for name, label in (
        ("expert_max_share", "largest share"),
        ("expert_entropy", "entropy / log E"),
    ):
        by_step.plot(
            steps, [each[name] for each in use], linewidth=0.9, label=f"{label}, least even layer"
        )
    by_step.axhline(1 / shares.shape[1], color="#777777", linestyle=":", label="1 / E")
    by_step.set(xlabel="step", ylim=(0, 1.05))
    by_step.legend(frameon=False)
    image = by_expert.imshow(shares, aspect="auto", vmin=0)
    by_expert.set(xlabel="expert", ylabel="layer", title=f"share of the choices, step {steps[-1]}")
    figure.colorbar(image, ax=by_expert)
    figure.savefig(path, dpi=120)


def _running_mean(values: np.ndarray) -> np.ndarray:
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - SMOOTHING_STEPS, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)
