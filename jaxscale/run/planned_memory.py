"""The memory of planned steps as the compiler says, a long pipeline's by two short ones."""

import concurrent.futures
import dataclasses

from jaxscale.launch.ahead_of_time import described_devices, memory_of
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.job import Layout
from jaxscale.planner.pipeline import num_in_flight
from jaxscale.run.compile import LoweredStep, bytes_per_device, lower_step
from jaxscale.run.planned import planned
from jaxscale.run.run import Run


class CompiledMemory:
    """Peaks of a run's steps under layouts, compiled for devices that need not be here.

    A pipeline's program has the whole stage in it for each micro-batch in flight, up to 2 S - 1
    times, and takes minutes to compile; what it needs grows by one slot with each. So it is
    compiled for one micro-batch and for two, side by side, and their difference counts for all
    others in flight.

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
        self._peaks: dict[str, int] = {}  # by program, as several layouts may be one

    def __call__(self, layout: Layout) -> int:
        """Bytes that a device needs."""
        if not _is_long(layout):
            return self._peak(self._lowered(layout, layout.num_microbatches))
        steps = [self._lowered(layout, num) for num in (1, 2)]
        # Moments on the host are told to the compiler by replacing a function of JAX for a time.
        num_threads = 1 if layout.mesh.is_optimizer_on_host else len(steps)
        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            one, two = pool.map(self._peak, steps)
        batch = bytes_per_device(steps[0].batch)
        num = layout.num_microbatches
        num_more = num_in_flight(layout.mesh, num) - 1
        return one + num_more * (two - one - batch) + (num - 1) * batch

    def _lowered(self, layout: Layout, num_microbatches: int) -> LoweredStep:
        """The step with so many micro-batches, of as many rows as the layout's."""
        run = planned(self.run, layout)
        rows = run.data.batch_size // layout.num_microbatches * num_microbatches
        run = dataclasses.replace(
            run,
            data=dataclasses.replace(run.data, batch_size=rows),
            train=dataclasses.replace(run.train, num_microbatches=num_microbatches),
        )
        return lower_step(run, self.devices[: layout.num_devices])

    def _peak(self, step: LoweredStep) -> int:
        program = step.lowered.as_text()
        if program not in self._peaks:
            self._peaks[program] = memory_of(step.compile()).peak
        return self._peaks[program]


def _is_long(layout: Layout) -> bool:
    """Whether a pipeline's program has a branch for each of more than three micro-batches.

    Several chunks ask for a whole round of micro-batches, and those of GPipe share one branch; see
    `parallel.pipeline.engine`.
    """
    mesh = layout.mesh
    has_branches = mesh.num_chunks == 1 and mesh.schedule != "gpipe"
    return has_branches and num_in_flight(mesh, layout.num_microbatches) > 3
