"""What a run in chunks takes of devices and hosts, by arithmetic, before anything is allocated."""

import dataclasses
import functools
import math
from collections.abc import Callable

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
    lines = [_parts("on a device", memory.device), _parts("on the host", memory.host)]
    chunk = suggested_chunk(job, layout, state, strategy, device_bytes=device_bytes)
    lines.append(f"chunk_tokens  {chunk or 'none'} would fit, {strategy.chunk_tokens} is set")
    limits = dict(device_bytes=device_bytes, host_bytes=host_bytes)
    there = f"{device_bytes / GIB:.2f} GiB of a device"
    if math.isinf(host_bytes):
        there += " (no host is asked: host_gib)"
    else:
        there += f" and {host_bytes / GIB:.2f} of its host"
    title = f"by strategy   GiB on a device and on the host; tokens that fit {there}"
    lines.append(f"{title}, and GiB on the host that they take")
    for name, needs in _strategies(job, layout, strategy).items():
        longest = longest_length(needs, strategy.chunk_tokens, **limits)
        device, host, taken = (size / GIB for size in (*needs(job.length), needs(longest)[1]))
        lines.append(f"  {name:<34}{device:>9.2f}{host:>9.2f}{longest:>12,}{taken:>9.2f}")
    return lines


Needs = Callable[[int], tuple[float, float]]


def _strategies(job: Job, layout: Layout, strategy: FullyPipelined) -> dict[str, Needs]:
    """Name -> (tokens of a row -> bytes on a device and on the host).

    Whole layers have full remat, Ulysses over the mesh's sequence axis, and ZeRO of each level.
    """
    mesh, found, count = layout.mesh, {}, StateCounter(job)
    is_sharded = mesh.data * mesh.sequence > 1
    levels = (1, 2, 3) if is_sharded else (mesh.zero,)
    whole = [dataclasses.replace(layout, mesh=dataclasses.replace(mesh, zero=z)) for z in levels]
    for each in whole:
        name = f"whole layers, ZeRO-{each.mesh.zero}"
        found[name] = functools.partial(_whole, job, each, count(each.mesh), is_offloaded=False)
    last = whole[-1]
    of_last = functools.partial(_whole, job, last, count(last.mesh), is_offloaded=True)
    found["the same, inputs on the host"] = of_last
    chunked = {"as it is set": strategy}
    chunked |= {name: dataclasses.replace(strategy, **each) for name, each in STRATEGIES.items()}
    for name, other in chunked.items():
        found[name] = functools.partial(_in_chunks, job, layout, count(mesh), other)
    return found


def _in_chunks(job, layout, state, strategy, length) -> tuple[float, float]:
    longer = dataclasses.replace(job, length=length)
    memory = chunked_memory(longer, layout, state, strategy)
    return memory.on_device, memory.on_host


def _whole(job, layout, state, length, *, is_offloaded: bool) -> tuple[float, float]:
    """Only the inputs of layers are kept, on the device or, but for two of them, on the host."""
    longer = dataclasses.replace(job, length=length)
    memory = step_memory(longer, dataclasses.replace(layout, remat="full"), state)
    here = min(1, 2 / job.model.num_periods) if is_offloaded else 1
    away = (1 - here) * memory.stashed
    return memory.total - away, memory.host + away


def _parts(title: str, parts: dict[str, float]) -> str:
    total = sum(parts.values())
    named = " + ".join(f"{size / GIB:.2f} {name}" for name, size in parts.items() if size)
    return f"{title:<13} {total / GIB:.2f} GiB, estimated: {named}"
