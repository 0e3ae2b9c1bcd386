"""What a run in chunks takes of devices and hosts, by arithmetic, before anything is allocated."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

from jaxscale.launch.memory import GIB
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.planner.chunks import (
    ChunkedMemory,
    chunked_memory,
    longest_length,
    suggested_chunk,
)
from jaxscale.planner.job import Job, Layout
from jaxscale.planner.memory import step_memory
from jaxscale.planner.state import StateCounter
from jaxscale.run.job import job_of, layout_of
from jaxscale.run.run import Run

ON_DEVICE = dict(inputs="device", attention="device", chunks="device")
# Strategies beside which a run's own is shown.
STRATEGIES = {
    "chunks, all on the device": ON_DEVICE,
    "chunks, inputs alone on the host": ON_DEVICE | dict(inputs="host"),
    "chunks, all on the host": dict(inputs="host", attention="host", chunks="host"),
    "chunks, attention run twice": dict(inputs="host", attention="nowhere", chunks="host"),
}

# (tokens of a row) -> (bytes on a device, bytes on the host).
Needs = Callable[[int], tuple[float, float]]


def is_chunked(run: Run) -> bool:
    """Whether a run's layers are executed by `FullyPipelined`."""
    return isinstance(run.execution.strategy, FullyPipelined)


def memory_of_chunks(run: Run) -> ChunkedMemory:
    """What a step of a run in chunks holds."""
    job, layout = job_of(run), layout_of(run)
    state = StateCounter(job)(run.mesh)
    return chunked_memory(job, layout, state, run.execution.strategy)


def chunk_lines(run: Run, device_bytes: float, host_bytes: float) -> list[str]:
    """What `inspect` says of a run in chunks: its memory, other strategies', lengths that fit.

    Args:
        run: the run.
        device_bytes: that JAX may take of a device.
        host_bytes: a device's share of its host; infinite where nobody says.
    """
    job, layout = job_of(run), layout_of(run)
    state = StateCounter(job)(run.mesh)
    strategy = run.execution.strategy
    memory = chunked_memory(job, layout, state, strategy)
    chunk = suggested_chunk(job, layout, state, strategy, device_bytes=device_bytes)
    lines = [
        _parts("on a device", memory.device),
        _parts("on the host", memory.host),
        f"chunk_tokens  {chunk or 'none'} would fit, {strategy.chunk_tokens} is set",
        _title(device_bytes, host_bytes),
    ]
    for name, needs in [*_whole_layers(job, layout), *_chunked_layers(job, layout, strategy)]:
        longest = longest_length(
            needs, strategy.chunk_tokens, device_bytes=device_bytes, host_bytes=host_bytes
        )
        on_device, on_host = needs(job.length)
        _, on_host_of_longest = needs(longest)
        in_gib = f"{on_device / GIB:>9.2f}{on_host / GIB:>9.2f}"
        lines.append(f"  {name:<34}{in_gib}{longest:>12,}{on_host_of_longest / GIB:>9.2f}")
    return lines


def _title(device_bytes: float, host_bytes: float) -> str:
    """What stands above the rows by strategy."""
    limits = f"{device_bytes / GIB:.2f} GiB of a device"
    if math.isinf(host_bytes):
        limits += " (no host is asked: host_gib)"
    else:
        limits += f" and {host_bytes / GIB:.2f} of its host"
    return (
        f"by strategy   GiB on a device and on the host; tokens that fit {limits}, "
        "and GiB on the host that they take"
    )


def _whole_layers(job: Job, layout: Layout) -> Iterator[tuple[str, Needs]]:
    """(name, what it needs) of layers with full remat, by level of ZeRO and with inputs offloaded.

    The mesh's sequence axis has Ulysses.
    """
    count = StateCounter(job)
    is_sharded = layout.mesh.data * layout.mesh.sequence > 1
    levels = (1, 2, 3) if is_sharded else (layout.mesh.zero,)
    for level in levels:
        mesh = dataclasses.replace(layout.mesh, zero=level)
        at_level = dataclasses.replace(layout, mesh=mesh, remat="full")
        needs = functools.partial(_whole, job, at_level, count(mesh))
        yield f"whole layers, ZeRO-{level}", functools.partial(needs, is_offloaded=False)
    yield "the same, inputs on the host", functools.partial(needs, is_offloaded=True)


def _chunked_layers(
    job: Job,
    layout: Layout,
    strategy: FullyPipelined,
) -> Iterator[tuple[str, Needs]]:
    """(name, what it needs) of the run's strategy and of those that are shown beside it."""
    state = StateCounter(job)(layout.mesh)
    yield "as it is set", functools.partial(_in_chunks, job, layout, state, strategy)
    for name, places in STRATEGIES.items():
        other = dataclasses.replace(strategy, **places)
        yield name, functools.partial(_in_chunks, job, layout, state, other)


def _in_chunks(job, layout, state, strategy, length) -> tuple[float, float]:
    longer = dataclasses.replace(job, length=length)
    memory = chunked_memory(longer, layout, state, strategy)
    return memory.on_device, memory.on_host


def _whole(job, layout, state, length, *, is_offloaded: bool) -> tuple[float, float]:
    """Only the inputs of layers are kept, on the device or, but for two of them, on the host."""
    longer = dataclasses.replace(job, length=length)
    memory = step_memory(longer, layout, state)
    share_here = min(1, 2 / job.model.num_periods) if is_offloaded else 1
    offloaded = (1 - share_here) * memory.stashed
    return memory.total - offloaded, memory.host + offloaded


def _parts(title: str, parts: dict[str, float]) -> str:
    total = sum(parts.values())
    named = " + ".join(f"{size / GIB:.2f} {name}" for name, size in parts.items() if size)
    return f"{title:<13} {total / GIB:.2f} GiB, estimated: {named}"
