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

# An array of a residual slot, which is empty at first, as it is lowered: the bank's one place, the
# other dims, and the bits of its type. Activations and cotangents have two places.
SLOT = re.compile(r"@AllocateBuffer\(\) : \(\) -> tensor<1x((?:\d+x)*)[a-z]+(\d+)")
# Compiled by jax 0.10 a program has its slots once or twice, which a short one does not tell.
HAS_SLOTS_ONCE = jax.__version_info__ >= (0, 11)


class CompiledMemory:
    """Peaks of a run's steps under layouts, compiled for devices that need not be here.

    A pipeline's program has a stage's chunk in it for each one in flight, up to v S + S - 1 times,
    and takes minutes to compile; what it needs grows by one slot with each. So it is compiled for
    as few micro-batches, and with several chunks stages, as there can be, whose stages hold as many
    layers. Slots are known before a program is compiled, and count for all others in flight.
    jax 0.10 compiles the whole program.

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
        shorts = [_short(layout, planned(self.run, layout)) for layout in layouts]
        steps = [lower_step(run, self.devices[: math.prod(run.mesh.sizes)]) for run in shorts]
        texts = [step.lowered.as_text() for step in steps]
        programs = dict(zip(texts, steps, strict=True))
        # Moments on the host are told to the compiler by replacing a function of JAX for a time.
        is_on_host = any(layout.mesh.is_optimizer_on_host for layout in layouts)
        num_threads = 1 if is_on_host else os.cpu_count()
        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            peaks = dict(zip(programs, pool.map(_peak, programs.values()), strict=True))
        found = []
        for layout, run, step, text in zip(layouts, shorts, steps, texts, strict=True):
            beside = self._beside(layout, run, step, text) if _is_long(layout) else 0
            found.append(peaks[text] + beside)
        return found

    def _beside(
        self,
        layout: Layout,
        short: Run,
        step: LoweredStep,
        text: str,
    ) -> int:
        """Bytes that a long pipeline needs beside its short one: slots, rows, and its own state."""
        num, num_short = layout.num_microbatches, short.train.num_microbatches
        num_slots = num_in_flight(short.mesh, num_short)
        num_more = num_in_flight(layout.mesh, num) - num_slots
        rows = (num / num_short - 1) * bytes_per_device(step.batch)
        state = 0
        if short.mesh.pipeline != layout.mesh.pipeline:
            # What is in no layer is shared by all stages between steps.
            whole = planned(self.run, layout).setup(self.devices[: layout.num_devices])
            state = bytes_per_device(whole.state) - bytes_per_device(step.setup.state)
        return round(num_more * _slots(text) / num_slots + rows + state)


def _peak(step: LoweredStep) -> int:
    return memory_of(step.compile()).peak


def _short(layout: Layout, run: Run) -> Run:
    """The run with the fewest branches, of rows and of layers in each as many, if it has many."""
    if not _is_long(layout):
        return run
    mesh, model, num = run.mesh, run.model, 1
    if mesh.num_chunks > 1:
        # Several chunks ask for a whole round of micro-batches.
        num, stages = 2, mesh.pipeline
        mesh = dataclasses.replace(mesh, pipeline=num)
        periods = model.num_periods * num // stages
        num_layers = len(model.prefix) + periods * len(model.pattern)
        model = dataclasses.replace(model, num_layers=num_layers)
    rows = run.data.batch_size // layout.num_microbatches
    return dataclasses.replace(
        run,
        mesh=mesh,
        model=model,
        data=dataclasses.replace(run.data, batch_size=rows * num),
        train=dataclasses.replace(run.train, num_microbatches=num),
    )


def _slots(text: str) -> int:
    """Bytes of all residual slots of a lowered step."""
    total = 0
    for dims, bits in SLOT.findall(text):
        sizes = map(int, dims.split("x")[:-1])
        total += math.prod(sizes) * max(1, int(bits) // 8)
    return total


def _is_long(layout: Layout) -> bool:
    """Whether a pipeline's program has many branches, and a shorter one has stages of its size.

    The micro-batches of GPipe share one branch; see `parallel.pipeline.engine`.
    """
    mesh = layout.mesh
    num_shortest = 2 * mesh.num_chunks
    is_long = num_in_flight(mesh, layout.num_microbatches) > num_shortest
    is_cut_by_hand = mesh.num_chunks > 1 and mesh.stage_periods is not None
    return HAS_SLOTS_ONCE and mesh.schedule != "gpipe" and is_long and not is_cut_by_hand
