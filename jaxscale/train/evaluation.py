"""What an evaluator is, and what it is given.

An evaluator is called as `evaluator(context) -> {name: figure}`, by every process of a run. One that also has
`check(context)` is asked before the run writes anything, with `context.params` None and step 0: there it opens what it
reads and raises InputError if it could not evaluate this run.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxscale.models.config import ModelConfig
from jaxscale.parallel.mesh import BATCH_SPEC
from jaxscale.parallel.processes import batch_share
from jaxscale.types import Array, Batch, InputError, Params


@dataclasses.dataclass(frozen=True)
class EvaluationContext:
    """A model in training, as an evaluator sees it; a loop makes one and replaces `params` and `step` in it.

    Args:
        params: the parameters, placed on the mesh.
        step: finished steps.
        model: the model.
        mesh: the device mesh.
        sums: (params, batch, key) -> (sum_loss, sum_weight, metrics) over all devices, without gradients:
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
    """Raises InputError for an evaluator that was not built, or that says itself that it cannot evaluate this run."""
    for name, evaluator in evaluators.items():
        target = evaluator.func if isinstance(evaluator, functools.partial) else evaluator
        if inspect.isclass(target):
            expected = f"an evaluator: @{target.__name__}() with brackets builds it"
            raise InputError(f"evaluators[{name!r}]", target, expected)
        getattr(evaluator, "check", lambda context: None)(context)


def place(mesh: Mesh, batch: Batch) -> Batch:
    """This process's share of the global batch, numpy, to its devices."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    index, count = batch_share(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        first, size = index * len(rows), count * len(rows)

        def shard(where: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = where[0].indices(size)
            return rows[start - first : stop - first, *where[1:]]

        return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, shard)

    return jax.tree.map(put, batch)
