"""The memory of planned steps as the compiler says, a long pipeline's by a short one."""

import concurrent.futures
import dataclasses
import math
import os
import re
from collections.abc import Sequence

import jax

from jaxscale.launch.ahead_of_time import described_devices, memory_of
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.job import Layout
from jaxscale.planner.pipeline import num_in_flight
from jaxscale.run.compile import LoweredStep, bytes_per_device, lower_step
from jaxscale.run.planned import planned
from jaxscale.run.run import Run

# An array of `lax.empty` as it is lowered: its dims, each with an x, and the bits of its type.
EMPTY = re.compile(r"@AllocateBuffer\(\) : \(\) -> tensor<((?:\d+x)*)[a-z]+(\d+)")
# Compiled by jax 0.10 a program has its slots once or twice, which a short one does not tell.
HAS_SLOTS_ONCE = jax.__version_info__ >= (0, 11)


class CompiledMemory:
    """Peaks of a run's steps under layouts, compiled for devices that need not be here.

    A pipeline's program has the whole stage in it for each micro-batch in flight, up to 2 S - 1
    times, and takes minutes to compile; what it needs grows by one slot with each. So it is
    compiled for one micro-batch. What it would allocate more for a second one, which is known
    before it is compiled, counts for all others in flight. jax 0.10 compiles the whole program.

    Args:
        run: whose mesh, micro-batches and remat a layout replaces.
        cluster: its devices.
    Raises:
        InputError: one cannot compile for them.
    """

    def __init__(self, run: Run, cluster: Cluster):
        self.run = run
        hosts = {"num_hosts": cluster.num_hosts, "gpus_per_host": cluster.devices_per_host}
        self.devices = described_devices(cluster.device.name, **hosts)

    def __call__(self, layouts: Sequence[Layout]) -> list[int]:
        """Bytes that a device needs under each layout; each distinct program is compiled once."""
        steps = [self._steps(layout) for layout in layouts]
        programs = {each[0].lowered.as_text(): each[0] for each in steps}
        # Moments on the host are told to the compiler by replacing a function of JAX for a time.
        is_on_host = any(layout.mesh.is_optimizer_on_host for layout in layouts)
        num_threads = 1 if is_on_host else os.cpu_count()
        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            peaks = pool.map(_peak, programs.values())
            by_program = dict(zip(programs, peaks, strict=True))
        found = []
        for layout, each in zip(layouts, steps, strict=True):
            peak = by_program[each[0].lowered.as_text()]
            found.append(peak + _beside(layout, *each))
        return found

    def _steps(self, layout: Layout) -> list[LoweredStep]:
        """The step that is compiled, and the same with a second slot if it has but one."""
        whole = planned(self.run, layout)
        runs = [whole]
        if _is_long(layout):
            rows = whole.data.batch_size // layout.num_microbatches
            runs = [_shortened(whole, rows, num) for num in (1, 2)]
        devices = self.devices[: layout.num_devices]
        return [lower_step(run, devices) for run in runs]


def _peak(step: LoweredStep) -> int:
    return memory_of(step.compile()).peak


def _shortened(run: Run, rows: int, num_microbatches: int) -> Run:
    """The run with a batch of a few micro-batches of so many rows."""
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, batch_size=rows * num_microbatches),
        train=dataclasses.replace(run.train, num_microbatches=num_microbatches),
    )


def _beside(
    layout: Layout,
    one: LoweredStep,
    two: LoweredStep | None = None,
) -> int:
    """Bytes that a layout needs beside its step of one micro-batch, given that of two."""
    if two is None:
        return 0
    num = layout.num_microbatches
    slot = _allocated(two) - _allocated(one)
    num_more = num_in_flight(layout.mesh, num) - 1
    return num_more * slot + (num - 1) * bytes_per_device(one.batch)


def _allocated(step: LoweredStep) -> int:
    """Bytes of all arrays that a step has empty at first, as slots are."""
    total = 0
    for dims, bits in EMPTY.findall(step.lowered.as_text()):
        sizes = map(int, dims.split("x")[:-1])
        total += math.prod(sizes) * max(1, int(bits) // 8)
    return total


def _is_long(layout: Layout) -> bool:
    """Whether a pipeline's program has a branch for each of more than two micro-batches.

    Several chunks ask for a whole round of micro-batches, and those of GPipe share one branch; see
    `parallel.pipeline.engine`.
    """
    mesh = layout.mesh
    has_branches = mesh.num_chunks == 1 and mesh.schedule != "gpipe"
    is_long = num_in_flight(mesh, layout.num_microbatches) > 2
    return HAS_SLOTS_ONCE and has_branches and is_long
