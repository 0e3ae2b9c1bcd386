"""`evaluate`: a run's checkpoint, measured on any mesh."""

import dataclasses
import errno
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxscale.checkpoint.restore import restore_params
from jaxscale.data.loader import DataConfig, warn_of_trained_documents
from jaxscale.data.tokenizer import check_tokenizer, load_tokenizer
from jaxscale.evaluate.perplexity import BitsPerByte
from jaxscale.launch.memory import check_fits
from jaxscale.launch.runtime import apply_runtime
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.models.evaluation import EvaluationContext, check_evaluators
from jaxscale.models.quantised import QuantisedConfig, dequantised, quantised
from jaxscale.rlhf.accuracy import PreferenceAccuracy
from jaxscale.rlhf.rollouts import HeldOutRewards
from jaxscale.run.evaluation import all_figures, evaluation_context
from jaxscale.run.fit import check_fit
from jaxscale.run.run import Run
from jaxscale.train.metrics import json_value, writing
from jaxscale.train.state import stored_params
from jaxscale.types import InputError, Params

logger = logging.getLogger(__name__)

READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


def evaluate(
    *,
    run: Run,
    step: int | None = None,
    quantisation: QuantisedConfig | None = None,
) -> dict[str, Any]:
    """Measures a checkpoint, on any mesh; prints the figures and writes them to the run's folder.

    They go to evaluation_STEP.json, in place of those of an earlier call; of rounded weights to a
    file of their own, such as evaluation_STEP_bits_4.json. Where the run is read-only, a warning
    says so. A run without evaluators has `BitsPerByte` as "held_out", of pairs
    `PreferenceAccuracy`, and of prompts `HeldOutRewards`.

    Args:
        run: the run; its mesh may be another one than that of the training.
        step: which checkpoint; the newest when None.
        quantisation: measures the model whose weights are rounded so; None leaves them as they are.
    Returns:
        "name/figure" -> value.
    Raises:
        InputError: the parts do not fit one another, there is no such checkpoint, or it had another
            tokenizer.
    """
    apply_runtime(run.runtime, str(run.path))
    if not run.evaluators:
        run = dataclasses.replace(run, evaluators={"held_out": _measure(run)})
    check_fit(run)
    region = run.region()
    context = evaluation_context(run, region, run.loss(run))
    check_evaluators(run.evaluators, context)
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
    params = restored.params
    if quantisation is not None:
        params = _rounded(params, run, quantisation)
    context = dataclasses.replace(context, params=params, step=restored.step)
    figures = all_figures(run, context)
    if jax.process_index() == 0:
        lines = [f"{name:<30} {_figure_text(value)}" for name, value in figures.items()]
        print("\n".join([f"step {restored.step}", *lines]))
        path = run.path / f"evaluation_{restored.step}{_suffix(quantisation)}.json"
        _write_figures(path, {"step": restored.step, **figures})
    return figures


def _measure(run: Run) -> Callable[[EvaluationContext], dict[str, Any]]:
    if run.rollouts is not None:
        return HeldOutRewards(run.data, run.rollouts)
    return PreferenceAccuracy(run.data) if run.data.is_paired else BitsPerByte(run.data)


def _rounded(params: Params, run: Run, quantisation: QuantisedConfig) -> Params:
    """What the integers of parameters stand for, where and in the type in which they were."""

    @functools.partial(jax.jit, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, params))
    def of(params: Params) -> Params:
        small = quantised(params, run.table(), quantisation)
        return dequantised(small, run.policy.parameters)

    return of(params)


def _suffix(quantisation: QuantisedConfig | None) -> str:
    """What the name of a file of figures says of rounded weights."""
    if quantisation is None:
        return ""
    given = vars(quantisation).items()
    return "".join(f"_{name}_{value}" for name, value in given if value is not None)


def _figure_text(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"{value:.6g}"


def _check_data(data: DataConfig, saved: dict[str, Any]) -> None:
    """Refuses another tokenizer than the saved one, and warns of documents that were trained on."""
    check_tokenizer(saved, load_tokenizer(data.tokenizer))
    warn_of_trained_documents(saved, data)


def _write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Writes what has been printed; a run that is somebody else's may be read-only."""
    text = json.dumps(json_value(figures), indent=1, allow_nan=False)
    temporary = path.with_suffix(".tmp")
    try:
        with writing(path):
            temporary.write_text(f"{text}\n")
            temporary.replace(path)
    except InputError as error:
        if error.__cause__.errno not in READ_ONLY:
            raise
        logger.warning("the figures are not in %s: %s", path, error.__cause__.strerror)
