"""A pipeline's schedule in closed form: micro-batches in flight, ticks and seconds.

The tables themselves take milliseconds each to make, too long for thousands of layouts.
"""

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


def closed_seconds(
    mesh: MeshConfig,
    num_microbatches: int,
    passes: np.ndarray,
) -> float:
    """Seconds of a table by its schedule's bubble, at the pace of the slowest stage.

    Args:
        mesh: names the schedule.
        num_microbatches: M.
        passes: seconds [chunks, stages, 3] of forward, backward and weight gradient.
    """
    by_chunk = passes.sum(2)
    chunk, stage = np.unravel_index(by_chunk.argmax(), by_chunk.shape)
    ramp = by_chunk[chunk, stage]
    if mesh.schedule == "zero_bubble":
        ramp = ramp - 2 * passes[chunk, stage, WEIGHT]
    steady = num_microbatches * by_chunk.sum(0).max()
    return float(steady + (mesh.pipeline - 1) * max(0.0, ramp))


def exact_seconds(
    mesh: MeshConfig,
    num_microbatches: int,
    passes: np.ndarray,
) -> float:
    """Seconds of a table, tick by tick; arguments as `closed_seconds`."""
    schedule = make_schedule(mesh.schedule, mesh.pipeline, mesh.num_chunks, num_microbatches)
    return duration(schedule, *np.moveaxis(passes, 2, 0))
