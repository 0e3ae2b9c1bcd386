"""What a training says in the terminal beside its bar: what begins, held-out figures, what came."""

import datetime
import logging
from collections.abc import Mapping
from typing import Any

import jax

from jaxscale.models.parameters import count_parameters
from jaxscale.parallel.mesh import AXES
from jaxscale.run.run import Run
from jaxscale.train.loop import Outcome
from jaxscale.train.metrics import read_history

logger = logging.getLogger(__name__)


def say_what_begins(run: Run, rows_per_epoch: list[int]) -> None:
    """Parameters, mesh and data.

    Args:
        run: that begins.
        rows_per_epoch: rows that hold each source once.
    """
    total, active = count_parameters(run.table())
    axes = [f"{axis} {getattr(run.mesh, axis)}" for axis in AXES if getattr(run.mesh, axis) > 1]
    rows, length = sum(rows_per_epoch), run.data.sequence_length
    _say(f"model: {total:,} parameters, {active:,} of them active")
    _say(f"mesh: {', '.join(axes) or 'one device'}")
    _say(f"data: {rows:,} rows of {length} tokens an epoch, {run.data.batch_size} a step")


def say_figures(step: int, figures: Mapping[str, Any]) -> None:
    """What an evaluation has measured."""
    texts = [f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float)]
    if texts:
        _say(f"step {step}: {', '.join(texts)}")


def say_what_came(run: Run, outcome: Outcome, seconds: float) -> None:
    """Steps, time, the last figures, where they are, and what can be done with them."""
    if jax.process_index() != 0:
        return
    time = datetime.timedelta(seconds=round(seconds))
    text = f"step {outcome.step} of {run.train.steps} after {time}"
    losses = [line["loss"] for line in read_history(run.path / "metrics.jsonl") if "loss" in line]
    if losses and losses[-1] is not None:
        text += f", loss {losses[-1]:.4g}"
    _say(f"{text}; figures and checkpoints are in {run.path}")
    if outcome.signal is None:
        _say(f"next: jaxscale evaluate {run.path}, or jaxscale generate {run.path} --set prompts=a")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        logger.info("%s", text)
