"""A planner where a run's mesh goes, and the search behind it and behind `plan`."""

import dataclasses
import logging
from typing import Any

from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.parallel.sequence.head_chunks import HeadChunks
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.explain import layout_text
from jaxscale.planner.job import Job, Layout
from jaxscale.planner.search import Found, Planner
from jaxscale.run.compile import memory_share
from jaxscale.run.job import job_of
from jaxscale.run.run import Run
from jaxscale.types import InputError, RunError, check_types

logger = logging.getLogger(__name__)

# Of JAX's share; the rest is for what the model of the memory does not know.
SHARE_OF_LIMIT = 0.90


@dataclasses.dataclass(frozen=True)
class PlannedMesh:
    """A planner where a mesh goes: `run.Run.mesh = @run.PlannedMesh()`.

    Args:
        devices: as `plan` takes them.
        pinned: as `plan` takes them.
    """

    devices: str
    pinned: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_types(self)

    def __call__(self, run: Run) -> Run:
        """The run, spread as is fastest; Raises as `plan`."""
        cluster = Cluster.parse(self.devices)
        best = search(job_of(run), cluster, self.pinned, memory_share()).ranked[0]
        logger.info("planned for %s: %s", cluster.text, layout_text(best.layout))
        return planned(run, best.layout)


def search(
    job: Job,
    cluster: Cluster,
    pinned: dict[str, Any],
    share: float,
) -> Found:
    """What `Planner.search` finds within JAX's share of the memory.

    Where devices are gone, fewer than are left may be faster, as 12 often are than 13.

    Raises:
        InputError: no layout has the pinned values, or the run's strategy of execution is one whose
            time and memory are not modelled.
        RunError: nothing fits.
    """
    strategy = job.execution.strategy
    if isinstance(strategy, FullyPipelined | HeadChunks):
        expected = "Whole() or ByChunk(...) for the planner, which does not model this one's time"
        raise InputError("ExecutionConfig.strategy", strategy, expected)
    found = _search(job, cluster, pinned, share)
    if found is None:
        expected = f"values that the model and {cluster.num_devices} devices allow"
        raise InputError("pinned", pinned, expected)
    if not found.ranked[0].fits and "is_optimizer_on_host" not in pinned:
        # Moments on the host cost their way over the link in each step: only where they must.
        found = _search(job, cluster, pinned | {"is_optimizer_on_host": True}, share) or found
    nearest = found.ranked[0]
    if not nearest.fits:
        over = f"{nearest.excess_bytes:,.0f} bytes above {nearest.limit_bytes:,.0f}"
        text = layout_text(nearest.layout)
        raise RunError(f"no layout fits; the nearest needs {over}: {text}")
    return found


def _search(
    job: Job,
    cluster: Cluster,
    pinned: dict[str, Any],
    share: float,
) -> Found | None:
    """The best of all numbers of devices that may be used; None if nothing is possible."""
    limit = cluster.device.memory_bytes * share * SHARE_OF_LIMIT
    clusters = [cluster]
    if cluster.num_gone:
        for more in range(1, cluster.num_devices // 2 + 1):
            num_gone = cluster.num_gone + more
            clusters.append(dataclasses.replace(cluster, num_gone=num_gone))
    found = [Planner(job, each, limit).search(pinned) for each in clusters]
    possible = [each for each in found if each.ranked]
    return min(possible, key=lambda each: each.ranked[0].rank, default=None)


def planned(run: Run, layout: Layout) -> Run:
    """The run spread as a layout says."""
    num_microbatches = layout.num_microbatches
    return dataclasses.replace(
        run,
        mesh=layout.mesh,
        train=dataclasses.replace(run.train, num_microbatches=num_microbatches),
        execution=dataclasses.replace(
            run.execution,
            remat=layout.remat,
            is_scanned=layout.is_scanned,
        ),
    )
