"""What the train loop hands to an evaluator: `evaluator(context) -> {name: figure}`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxscale.models.config import ModelConfig
from jaxscale.parallel.mesh import BATCH_SPEC
from jaxscale.types import Array, Batch, Params


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


def place(mesh: Mesh, batch: Batch) -> Batch:
    """This host's rows of the global batch, numpy, to the devices."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
