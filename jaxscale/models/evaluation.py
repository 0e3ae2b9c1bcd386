"""What an evaluator is, and what it is given.

An evaluator is called as `evaluator(context) -> {name: figure}`, by every process of a run. One
that also has `check(context)` is asked before the run writes anything, with `context.params` None
and step 0: there it opens what it reads and raises InputError if it could not evaluate this run.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from jaxscale.models.config import ModelConfig
from jaxscale.types import Array, Batch, InputError, Params


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
    """

    params: Params
    step: int
    model: ModelConfig
    mesh: Mesh
    sums: Callable[..., tuple[Array, Array, dict[str, Any]]]
    place: Callable[[Batch], Batch]


def check_evaluators(evaluators: Mapping[str, Callable], context: EvaluationContext) -> None:
    """Raises InputError for an evaluator that was not built or says that it cannot run here."""
    for name, evaluator in evaluators.items():
        target = evaluator.func if isinstance(evaluator, functools.partial) else evaluator
        if inspect.isclass(target):
            expected = f"an evaluator: @{target.__name__}() with brackets builds it"
            raise InputError(f"evaluators[{name!r}]", target, expected)
        getattr(evaluator, "check", lambda context: None)(context)
