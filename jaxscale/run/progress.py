"""What a training says in the terminal beside its bar: what begins, held-out figures, what came."""

import datetime
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxscale.data.loader import TrainLoader
from jaxscale.data.prompt_loader import PromptLoader
from jaxscale.models.parameters import count_parameters
from jaxscale.parallel.mesh import AXES
from jaxscale.run.run import Run
from jaxscale.train.loop import Outcome
from jaxscale.train.metrics import HISTORY, read_history
from jaxscale.train.reporters import texts

logger = logging.getLogger(__name__)


def say_what_begins(run: Run, loader: TrainLoader | PromptLoader) -> None:
    """Parameters, mesh and data.

    Args:
        run: that begins.
        loader: of its training split.
    """
    total, active = count_parameters(run.table())
    axes = [f"{axis} {getattr(run.mesh, axis)}" for axis in AXES if getattr(run.mesh, axis) > 1]
    _say(f"model: {total:,} parameters, {active:,} of them active")
    _say(f"mesh: {', '.join(axes) or 'one device'}")
    if run.rollouts is not None:
        _say(f"data: {len(loader.prompts):,} prompts, {loader.num_others:,} more are held out")
        num, tensor = run.rollouts.num_answers, run.rollouts.tensor
        answers = "1 answer" if num == 1 else f"{num} answers"
        _say(f"a step: {answers} to each of {run.data.batch_size // num} prompts")
        groups = math.prod(run.mesh.sizes) // tensor
        _say(f"answers: written by {groups} x {tensor} devices, each group with a whole model")
        return
    rows, length = sum(loader.rows_per_epoch), run.data.sequence_length
    documents = f"{loader.num_documents:,} documents of {loader.num_tokens:,} tokens"
    _say(f"data: {documents}, {loader.num_held_out:,} more are held out")
    _say(f"an epoch: {rows:,} rows of {length} tokens, {run.data.batch_size} a step")


def say_figures(step: int, figures: Mapping[str, Any]) -> None:
    """What an evaluation has measured, and what the model has written for it."""
    if numbers := _numbers_text(figures):
        _say(f"step {step}: {numbers}")
    for name, text in texts(figures).items():
        _say(f"step {step}: {name} {text!r}")


def say_what_came(run: Run, outcome: Outcome, seconds: float) -> None:
    """Steps, time, the last figures, where they are, and what can be done with them."""
    if jax.process_index() != 0:
        return
    time = datetime.timedelta(seconds=round(seconds))
    text = f"step {outcome.step} of {run.train.steps} after {time}"
    history = read_history(run.path / HISTORY)
    losses = [line["loss"] for line in history if "loss" in line]
    if losses and losses[-1] is not None:
        text += f", loss {losses[-1]:.4g}"
    evaluations = [_numbers_text(line) for line in history if "loss" not in line]
    if any(evaluations):
        text += f", {evaluations[-1]}"
    _say(f"{text}; figures and checkpoints are in {run.path}")
    if outcome.signal is None:
        is_reward = run.model.use_value_head
        verb, field = ("score", "texts") if is_reward else ("generate", "prompts")
        _say(f"next: jaxscale evaluate {run.path}, or jaxscale {verb} {run.path} --set {field}=a")


def _numbers_text(figures: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _say(text: str) -> None:
    if jax.process_index() == 0:
        logger.info("%s", text)
