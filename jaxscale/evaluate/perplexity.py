"""Held-out loss: nats a token, perplexity and bits per byte.

As an evaluator of a run, and as the `evaluate` verb.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxscale.checkpoint.restore import restore_params
from jaxscale.data.loader import (
    DataConfig,
    HeldOutLoader,
    check_tokenizer,
    make_loader,
    warn_of_trained_documents,
)
from jaxscale.data.tokenizer import check_vocabulary, load_tokenizer
from jaxscale.launch.runtime import apply_runtime
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.models.evaluation import EvaluationContext, check_evaluators
from jaxscale.parallel.batch import batch_share, place
from jaxscale.train.metrics import writing
from jaxscale.train.run import Run, check_fit
from jaxscale.train.state import stored_params
from jaxscale.types import Batch, InputError, check_positive, check_types


@dataclasses.dataclass(frozen=True)
class BitsPerByte:
    """Evaluator that goes once over the held-out documents.

    A document's first token is given and the one that ends it is predicted; bytes are those of the
    documents' text, so that models with different tokenizers can be compared.

    Source: bits per byte, Gao et al. 2020 (arXiv 2101.00027), section 3.1.
    Args:
        data: as the run's.
        max_batches: at most so many batches, evenly spread over the pass, with the bytes per token
            of the whole pass.
    """

    data: DataConfig
    max_batches: int | None = None

    def __post_init__(self):
        check_types(self)
        if self.max_batches is not None:
            check_positive("BitsPerByte.max_batches", self.max_batches)
        if self.data.held_out_fraction == 0:
            raise InputError(
                "DataConfig.held_out_fraction",
                0,
                "above 0: no document is held out to be evaluated on",
            )

    def check(self, context: EvaluationContext) -> None:
        """Opens the held-out documents, for the first time.

        Raises:
            InputError: the tokenizer knows more tokens than the model, or there are no held-out
                documents.
        """
        check_vocabulary(load_tokenizer(self.data.tokenizer), context.model.vocab_size)
        _open(self.data, *batch_share(context.mesh))

    def __call__(self, context: EvaluationContext) -> dict[str, float]:
        """Returns `loss` (nats a token), `perplexity` and `bits_per_byte`."""
        nll = weight = 0.0
        loader = _open(self.data, *batch_share(context.mesh))
        for batch in self._batches(loader):
            _, batch_weight, metrics = context.sums(
                context.params, context.place(batch), jax.random.key(0)
            )
            nll, weight = nll + float(metrics["nll"]), weight + float(batch_weight)
        loss = nll / max(weight, 1.0)
        tokens_per_byte = loader.num_tokens / loader.num_bytes
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # beyond is no float
            "bits_per_byte": loss / math.log(2) * tokens_per_byte,
        }

    def _batches(self, loader: HeldOutLoader) -> Iterator[Batch]:
        """All in order, or some of them: rows are packed longest piece first, so the first batches are no sample."""
        total = len(loader)
        if self.max_batches is None or self.max_batches >= total:
            return iter(loader)
        numbers = np.linspace(0, total - 1, self.max_batches).round().astype(int)
        return (loader.batch_at(int(n)) for n in numbers)


@functools.lru_cache(maxsize=4)  # opened once for all of a run's evaluations
def _open(data: DataConfig, index: int, count: int) -> HeldOutLoader:
    return make_loader(data, split="held_out", process_index=index, process_count=count)


def evaluate(*, run: Run, step: int | None = None) -> dict[str, float]:
    """Measures a checkpoint, on any mesh; prints the figures and writes them to the run's directory.

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
    restored = restore_params(
        run.checkpoint.within(run.path),
        checkpoint_facts(run.model),
        stored_params(run.table(), region.mesh, region.specs, run.policy.parameters),
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
    warn_of_trained_documents(saved, data.held_out_fraction)


def _write_figures(path: Path, figures: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with writing(path):
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
        temporary.replace(path)
