"""The parameters of a run for whoever does not train on: evaluation, decoding, another run."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.parallel.pipeline.stages import StageLayout, canonical_shapes, from_canonical
from jaxscale.types import Params


@dataclasses.dataclass(frozen=True)
class Restored:
    """Parameters from a checkpoint.

    Args:
        step: finished steps of the run that saved them.
        params: the parameter tree.
    """

    step: int
    params: Params


def restore_params(
    config: CheckpointConfig,
    facts: dict[str, Any],
    stored: Params,
    *,
    dims: Any,
    layout: StageLayout,
    step: int | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
    left_out: tuple[str, ...] = (),
    is_averaged: bool = False,
) -> Restored:
    """Reads the parameters alone, on any mesh.

    Args:
        config: where the checkpoints are.
        facts: of the model, as `Checkpoints` takes them.
        stored: the parameters as shapes with shardings, as the mesh's stages store them.
        dims: their dim letters.
        layout: of the stages.
        step: which checkpoint; the newest when None.
        check: called with the loader's saved position before anything large is read.
        left_out: sections that the checkpoint has beside those of `stored`.
        is_averaged: whether the average stands in the place of each that was trained.
    Raises:
        InputError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    with contextlib.closing(Checkpoints(config, **facts)) as checkpoints:
        if check is not None:
            check(checkpoints.data_state(step))
        wanted = canonical_shapes(stored, dims, layout)
        params = checkpoints.restore_params(wanted, step, left_out, is_averaged)
        # Asked after the restore: a damaged checkpoint that was passed over no longer counts.
        found = checkpoints.latest_step() if step is None else step
    return Restored(found, from_canonical(params, stored, dims, layout))
