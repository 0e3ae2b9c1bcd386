"""What a run came to: its loss curve, and how it compares with counting baselines."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxscale.data.loader import DataConfig
from jaxscale.evaluate.ngram import NgramFigures, ngram_figures
from jaxscale.train.metrics import HISTORY, expert_use, read_history
from jaxscale.types import RunError

SMOOTHING_STEPS = 11
GREY = "#777777"

Lines = Sequence[Mapping[str, Any]]  # of `metrics.jsonl`


def plot_run(directory: Path, *, held_out: str) -> None:
    """Draw `loss.png` and, for a mixture of experts, `experts.png` into a run's directory.

    Args:
        directory: of the run, with `metrics.jsonl` and `starts.jsonl`; every start but the first
            is a resume.
        held_out: key of the held-out loss in `metrics.jsonl`, in nats per token.
    """
    metrics, picture = directory / HISTORY, directory / "loss.png"
    starts = (directory / "starts.jsonl").read_text().splitlines()
    resumes = [json.loads(line)["step"] for line in starts[1:]]
    history = read_history(metrics)
    plot_losses(history, picture, held_out=held_out, starts=resumes)
    if any("load" in line for line in history):
        plot_experts(history, directory / "experts.png")
    print(f"\nloss curve: {picture}   every step's figures: {metrics}")


def compare_with_ngrams(directory: Path, data: DataConfig, *, margin: float) -> str:
    """A run's held-out bits per byte beside those of counting models, and the use of its experts.

    Args:
        directory: of the run; its evaluator of BitsPerByte is called "held_out".
        data: as the run's.
        margin: the model must be at least this fraction below the bigram.
    Returns:
        Two lines of text.
    Raises:
        RunError: the model is not below the bigram by the margin, or an expert got no token in the
            last step.
    """
    history = read_history(directory / HISTORY)
    ngrams = ngram_figures(data)
    bits = _last(history, "held_out/bits_per_byte")
    bits = math.nan if bits is None else bits
    shares = []
    for load in _last(history, "load"):
        shares += [count / sum(load) for count in load]
    gain = 1 - bits / ngrams.token_bigram
    text = _comparison(bits, gain, ngrams, shares)
    if not gain >= margin or min(shares) == 0:  # so that NaN fails too
        expected = f"at least {margin:.0%} below the bigram and every expert used"
        raise RunError(f"expected {expected}:\n{text}")
    return text


def _last(history: Lines, key: str) -> Any:
    """The figure of the last line that has it."""
    return [line[key] for line in history if key in line][-1]


def _comparison(
    bits: float,
    gain: float,
    ngrams: NgramFigures,
    shares: Sequence[float],
) -> str:
    unigram = f"byte unigram {ngrams.byte_unigram:.3f}"
    bigram = f"Kneser-Ney bigram {ngrams.token_bigram:.3f}"
    model = f"this model {bits:.3f} ({gain:.1%} below the bigram)"
    use = f"{min(shares):.1%} to {max(shares):.1%}"
    first_line = f"held-out bits per byte: {unigram}, {bigram}, {model}"
    second_line = f"experts' shares of a step's tokens: {use}"
    return f"{first_line}\n{second_line}"


def plot_losses(
    history: Lines,
    path: Path,
    *,
    held_out: str,
    starts: Sequence[int] = (),
    levels: Mapping[str, float] | None = None,
) -> None:
    """Draw training and held-out loss by step, with every resume marked, as a PNG.

    Args:
        history: lines of `metrics.jsonl`; training lines have `nll` (nats per token), evaluations
            the key `held_out`.
        path: of the picture.
        held_out: key of the held-out loss, in nats per token.
        starts: finished steps at which the run was resumed.
        levels: name -> nats per token, drawn as a horizontal line, such as a bigram's loss.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    _plot_training(axes, curve(history, "nll"))
    evaluations = curve(history, held_out)
    if evaluations.size:
        axes.plot(
            *evaluations.T,
            "o-",
            color="#c4501b",
            markersize=4,
            label="held out",
        )
    for number, step in enumerate(starts):
        # Only the first line gets a label, so that the legend has one entry for all.
        label = None if number else "resumed"
        axes.axvline(
            step,
            color="#444444",
            linestyle="--",
            linewidth=1,
            label=label,
        )
    for number, (name, level) in enumerate((levels or {}).items()):
        style = (":", "-.")[number % 2]
        axes.axhline(
            level,
            color=GREY,
            linestyle=style,
            linewidth=1.2,
            label=name,
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def curve(history: Lines, key: str) -> np.ndarray:
    """[n, 2]: step and figure of each line that has the figure, NaN where it is null."""
    points = [(line["step"], line[key]) for line in history if key in line]
    return np.array(points, float)


def _plot_training(axes: Axes, curve: np.ndarray) -> None:
    """The loss of each step, and behind the noise its running mean."""
    steps, losses = curve.T
    axes.plot(steps, losses, color="#9dbad5", linewidth=0.8, label="training, each step")
    label = f"training, mean of the {SMOOTHING_STEPS} around"
    axes.plot(steps, running_mean(losses), color="#1f5a92", label=label)


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the values around each, at most SMOOTHING_STEPS together.

    A mean of those before it would trail, and the held-out loss seem to lie below a falling curve.
    """
    finite = np.isfinite(values)
    sums, counts = _running_sums(np.where(finite, values, 0)), _running_sums(finite)
    return sums / np.where(counts, counts, np.nan)


def _running_sums(values: np.ndarray) -> np.ndarray:
    sums = np.cumsum(np.concatenate([[0.0], values]))
    places = np.arange(len(values))
    to_nearest_end = np.minimum(places, places[::-1])
    reach = np.minimum(to_nearest_end, SMOOTHING_STEPS // 2)
    return sums[places + reach + 1] - sums[places - reach]


def plot_experts(history: Lines, path: Path) -> None:
    """Draw how evenly the experts are used, by step and by expert in the last step, as a PNG.

    Args:
        history: lines of `metrics.jsonl`; training lines have `load` [layers, E].
        path: of the picture.
    """
    lines = [line for line in history if "load" in line]
    figure = Figure(figsize=(9, 4), layout="constrained")
    by_step, by_expert = figure.subplots(1, 2)
    _plot_use(by_step, lines)
    load = np.array(lines[-1]["load"], float)
    # A layer may have no choices at all: its shares are then 0.
    totals = np.maximum(load.sum(1, keepdims=True), 1)
    image = by_expert.imshow(load / totals, aspect="auto", vmin=0)
    last_step = lines[-1]["step"]
    by_expert.set(xlabel="expert", ylabel="layer")
    by_expert.set_title(f"share of the choices, step {last_step}")
    figure.colorbar(image, ax=by_expert)
    figure.savefig(path, dpi=120)


def _plot_use(axes: Axes, lines: Lines) -> None:
    """Two curves over the steps: the largest share and the entropy of the least even layer."""
    labels = {"expert_max_share": "largest share", "expert_entropy": "entropy / log E"}
    steps = [line["step"] for line in lines]
    use = [expert_use(np.asarray(line["load"])) for line in lines]
    for name, label in labels.items():
        values = [of_step[name] for of_step in use]
        axes.plot(steps, values, linewidth=0.9, label=f"{label}, least even layer")
    num_experts = len(lines[-1]["load"][0])
    axes.axhline(1 / num_experts, color=GREY, linestyle=":", label="1 / E")
    axes.set(xlabel="step", ylim=(0, 1.05))
    axes.legend(frameon=False)
