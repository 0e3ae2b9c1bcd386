"""Held-out loss: nats a token, perplexity and bits per byte; as an evaluator of a run and as the `evaluate` verb."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.data.loader import (
    DataConfig,
    HeldOutLoader,
    check_tokenizer,
    make_loader,
    warn_of_trained_documents,
)
from jaxscale.data.tokenizer import check_vocabulary, load_tokenizer
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.models.config import ModelConfig, checkpoint_facts
from jaxscale.models.parameters import abstract_params
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import batch_share, place
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.pipeline.stages import canonical_shapes, from_canonical
from jaxscale.parallel.region import Region
from jaxscale.train.evaluation import EvaluationContext, check_evaluators
from jaxscale.train.losses import NextTokenLoss
from jaxscale.train.metrics import writing
from jaxscale.train.plan import TrainConfig, check_fit, make_region
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


def evaluate(
    *,
    directory: str,
    model: ModelConfig,
    mesh: MeshConfig,
    data: DataConfig,
    checkpoint: CheckpointConfig,
    policy: Policy = Policy(),
    stack: StackConfig = StackConfig(),
    runtime: RuntimeConfig = RuntimeConfig(),
    evaluators: dict[str, Callable] | None = None,
    step: int | None = None,
) -> dict[str, float]:
    """Measures a checkpoint, on any mesh; prints the figures and writes them to `directory`/evaluation_STEP.json.

    Args:
        directory: of the run, as `train.pretrain.pretrain` had it.
        model: the model.
        mesh: axis sizes and ZeRO level.
        data: held-out documents, sequence length and global batch size.
        checkpoint: its directory is relative to `directory`.
        policy: dtypes.
        stack: how the layers are executed.
        runtime: platform and flags.
        evaluators: name -> evaluator(context) -> figures; None for BitsPerByte on `data` as
            "held_out".
        step: which checkpoint; the newest when None.
    Returns:
        "name/figure" -> value.
    Raises:
        InputError: the parts do not fit one another, there is no such checkpoint, or it had another
            tokenizer.
    """
    run = Path(directory).expanduser()
    apply_runtime(runtime, str(run))
    evaluators = {"held_out": BitsPerByte(data)} if evaluators is None else evaluators
    train = TrainConfig(steps=1)
    region = make_region(model=model, mesh=mesh, train=train, policy=policy, stack=stack)
    check_fit(model=model, mesh=mesh, data=data, train=train, policy=policy, stack=stack)
    context = EvaluationContext(
        params=None,
        step=0,
        model=model,
        mesh=region.mesh,
        place=functools.partial(place, region.mesh),
        sums=jax.jit(region.evaluate(NextTokenLoss(model, policy, stack))),
    )
    check_evaluators(evaluators, context)
    step, params = _restore(checkpoint.within(run), model, data, region, policy, step)
    context = dataclasses.replace(context, params=params, step=step)
    figures = {
        f"{name}/{figure}": value
        for name, each in evaluators.items()
        for figure, value in each(context).items()
    }
    if jax.process_index() == 0:
        print(
            "\n".join(
                [f"step {step}", *(f"{name:<30} {value:.6g}" for name, value in figures.items())]
            )
        )
        _write_figures(run / f"evaluation_{step}.json", {"step": step, **figures})
    return figures


def _write_figures(path: Path, figures: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with writing(path):
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
        temporary.replace(path)


def _restore(
    checkpoint: CheckpointConfig,
    model: ModelConfig,
    data: DataConfig,
    region: Region,
    policy: Policy,
    step: int | None,
) -> tuple[int, Any]:
    """The step and its parameters, placed as the region wants them."""
    specs = region.specs
    stored = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(region.mesh, spec)
        ),
        jax.eval_shape(
            lambda params: specs.layout.store(params, specs.dims),
            abstract_params(model, policy.parameters),
        ),
        specs.parameters,
    )
    checkpoints = Checkpoints(checkpoint, **checkpoint_facts(model))
    try:
        data_state = checkpoints.data_state(step)
        check_tokenizer(data_state, load_tokenizer(data.tokenizer))
        warn_of_trained_documents(data_state, data.held_out_fraction)
        params = checkpoints.restore_params(
            canonical_shapes(stored, specs.dims, specs.layout), step
        )
        params = from_canonical(params, stored, specs.dims, specs.layout)
        # After the restore: a damaged checkpoint that was passed over no longer counts as the
        # latest.
        return checkpoints.latest_step() if step is None else step, params
    finally:
        checkpoints.close()
