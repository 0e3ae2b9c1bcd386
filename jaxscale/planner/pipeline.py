"""A pipeline's schedule in closed form: micro-batches in flight, ticks and seconds.

The tables themselves take milliseconds each to make, too long for thousands of layouts.
"""

import functools

import numpy as np

from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.pipeline.schedule import duration, make_schedule

FORWARD, BACKWARD, WEIGHT = range(3)


def num_in_flight(mesh: MeshConfig, num_microbatches: int) -> int:
    """Micro-batches whose residuals a stage keeps at most, each of one chunk."""
    stages, chunks = mesh.pipeline, mesh.num_chunks
    if stages == 1:
        return 1
    if mesh.schedule == "gpipe":
        return num_microbatches
    if chunks == 1:
        return min(num_microbatches, 2 * stages - 1)
    return min(num_microbatches * chunks, chunks * stages + stages - 1)


def num_ticks(mesh: MeshConfig, num_microbatches: int) -> int:
    """Ticks of the table, each of which ends in an exchange."""
    stages, chunks = mesh.pipeline, mesh.num_chunks
    if mesh.schedule == "gpipe":
        return 2 * num_microbatches + 2 * stages - 3
    if mesh.schedule == "zero_bubble":
        return num_microbatches + 3 * stages - 3
    if chunks == 1:
        return num_microbatches + 2 * stages - 2
    group, place = divmod(num_microbatches - 1, stages)
    return group * stages * chunks + place + 2 * stages * chunks - 1


def num_branches(mesh: MeshConfig, num_microbatches: int) -> int:
    """Conditionals that a stage runs: what a tick has, and of what there is which input and slot.

    See `parallel.pipeline.engine`.
    """
    is_split = mesh.schedule == "zero_bubble"
    has_slots = mesh.schedule != "gpipe"
    in_tick = 3 + is_split
    in_passes = 2 + has_slots * (2 + is_split)
    num_passes = num_microbatches * mesh.num_chunks
    return in_tick * num_ticks(mesh, num_microbatches) + in_passes * num_passes


def closed_seconds(
    mesh: MeshConfig,
    num_microbatches: int,
    passes: np.ndarray,
    head: float,
) -> float:
    """Seconds of a table: the slowest stage's work, and once through all others.

    Not exact where stages differ. A zero bubble of few micro-batches has no such form, so its table
    is run.

    Args:
        mesh: names the schedule.
        num_microbatches: M.
        passes: seconds [chunks, stages, 3] of forward, backward and weight gradient.
        head: seconds of a stage's share of the head, for one micro-batch.
    """
    is_split = mesh.schedule == "zero_bubble"
    if is_split and num_microbatches < 2 * (mesh.pipeline - 1):
        return exact_seconds(mesh, num_microbatches, passes, head)
    by_device = passes.sum((0, 2))
    slowest = int(by_device.argmax())
    others = np.delete(passes, slowest, axis=1)
    ramp = others.sum() / mesh.num_chunks
    if is_split:
        # Weight gradients fill the ticks in which a stage would wait.
        ramp = max(0.0, ramp - 2 * others[:, :, WEIGHT].sum())
    return float(num_microbatches * (by_device[slowest] + head) + ramp)


def exact_seconds(
    mesh: MeshConfig,
    num_microbatches: int,
    passes: np.ndarray,
    head: float,
) -> float:
    """Seconds of a table, tick by tick; arguments as `closed_seconds`."""
    schedule = _made(mesh.schedule, mesh.pipeline, mesh.num_chunks, num_microbatches)
    return duration(schedule, *np.moveaxis(passes, 2, 0), head)


_made = functools.cache(make_schedule)
