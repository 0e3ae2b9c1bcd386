"""What an evaluator is, and what it is given.

An evaluator is called as `evaluator(context) -> {name: figure}`, by every process of a run; a
figure is a number or a text. One
that also has `check(context)` is asked before the run writes anything, with `context.params` None
and step 0: there it opens what it reads and raises InputError if it could not evaluate this run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from jaxscale.data.loader import DataConfig
from jaxscale.models.config import ModelConfig
from jaxscale.types import Array, Batch, Params, check_built


@dataclasses.dataclass(frozen=True)
class EvaluationContext:
    """A model in training, as an evaluator sees it.

    A loop makes one and replaces `params` and `step` in it.

    Args:
        params: the parameters, placed on the mesh.
        step: finished steps.
        model: the model.
        mesh: the device mesh.
        sums: (params, batch, key) -> (sum_loss, sum_weight, metrics) over all devices, without
            gradients:
            `jax.jit(region.evaluate(loss_fn))`, made once so that it is compiled once.
        place: puts a host's numpy batch on the mesh.
        engine: (name of the parameter that gives it, tensor) -> `serve.hybrid_engine.HybridEngine`
            that writes on the run's devices, each copy of the model on so many; made once for each
            number.
        check_data: (name of an evaluator, the data that it goes over) -> None; raises InputError
            unless `sums` takes batches of that data's size and length.
    """

    params: Params
    step: int
    model: ModelConfig
    mesh: Mesh
    sums: Callable[..., tuple[Array, Array, dict[str, Any]]]
    place: Callable[[Batch], Batch]
    engine: Callable[[str, int], Any]
    check_data: Callable[[str, DataConfig], None]


def check_evaluators(evaluators: Mapping[str, Callable], context: EvaluationContext) -> None:
    """Raises InputError for an evaluator that was not built or says that it cannot run here."""
    for name, evaluator in evaluators.items():
        check_built(f"evaluators[{name!r}]", evaluator)
        getattr(evaluator, "check", lambda context: None)(context)
