"""`evaluate`: a run's checkpoint, measured on any mesh."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax

from jaxscale.checkpoint.restore import restore_params
from jaxscale.data.loader import DataConfig, check_tokenizer, warn_of_trained_documents
from jaxscale.data.tokenizer import load_tokenizer
from jaxscale.evaluate.perplexity import BitsPerByte
from jaxscale.launch.memory import check_fits
from jaxscale.launch.runtime import apply_runtime
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.models.evaluation import EvaluationContext, check_evaluators
from jaxscale.parallel.batch import place
from jaxscale.run.run import Run, check_fit
from jaxscale.train.metrics import json_value, writing
from jaxscale.train.state import stored_params


def evaluate(*, run: Run, step: int | None = None) -> dict[str, float]:
    """Measures a checkpoint, on any mesh; prints the figures and writes them to the run's folder.

    They go to evaluation_STEP.json. A run without evaluators has `BitsPerByte` as "held_out".

    Args:
        run: the run; its mesh may be another one than that of the training.
        step: which checkpoint; the newest when None.
    Returns:
        "name/figure" -> value.
    Raises:
        InputError: the parts do not fit one another, there is no such checkpoint, or it had another
            tokenizer.
    """
    apply_runtime(run.runtime, str(run.path))
    evaluators = run.evaluators or {"held_out": BitsPerByte(run.data)}
    check_fit(run)
    region = run.region()
    context = EvaluationContext(
        params=None,
        step=0,
        model=run.model,
        mesh=region.mesh,
        place=functools.partial(place, region.mesh),
        sums=jax.jit(region.evaluate(run.loss(run))),
    )
    check_evaluators(evaluators, context)
    stored = stored_params(run.table(), region.mesh, region.specs, run.policy.parameters)
    check_fits("model", {"parameters": stored})
    restored = restore_params(
        run.checkpoint.within(run.path),
        checkpoint_facts(run.model),
        stored,
        dims=region.specs.dims,
        layout=region.specs.layout,
        step=step,
        check=functools.partial(_check_data, run.data),
    )
    context = dataclasses.replace(context, params=restored.params, step=restored.step)
    figures = {
        f"{name}/{figure}": value
        for name, evaluator in evaluators.items()
        for figure, value in evaluator(context).items()
    }
    if jax.process_index() == 0:
        lines = [f"{name:<30} {value:.6g}" for name, value in figures.items()]
        print("\n".join([f"step {restored.step}", *lines]))
        path = run.path / f"evaluation_{restored.step}.json"
        _write_figures(path, {"step": restored.step, **figures})
    return figures


def _check_data(data: DataConfig, saved: dict[str, Any]) -> None:
    """Refuses another tokenizer than the saved one, and warns of documents that were trained on."""
    check_tokenizer(saved, load_tokenizer(data.tokenizer))
    warn_of_trained_documents(saved, data)


def _write_figures(path: Path, figures: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with writing(path):
        temporary.write_text(json.dumps(json_value(figures), indent=1, allow_nan=False) + "\n")
        temporary.replace(path)
