"""The best layouts of a job on a cluster, by a best-first search."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from jaxscale.parallel.mesh import check_batch
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.job import Job, Layout
from jaxscale.planner.layer_scale import AsModelled, LayerScale
from jaxscale.planner.memory import StepMemory, step_memory
from jaxscale.planner.space import Space
from jaxscale.planner.state import StateCounter
from jaxscale.planner.step_time import Clock, StepTime
from jaxscale.types import InputError

NUM_KEPT = 12  # families of layouts that a search ranks


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout with its estimate.

    Args:
        layout: how the job is spread.
        time: of a step.
        memory: of a step, on each device.
        limit_bytes: that it may need.
    """

    layout: Layout
    time: StepTime
    memory: StepMemory
    limit_bytes: float

    @property
    def excess_bytes(self) -> float:
        """Bytes above the limit; negative if it fits."""
        return self.memory.total - self.limit_bytes

    @property
    def fits(self) -> bool:
        """Whether its memory is within the limit."""
        return self.excess_bytes <= 0

    @functools.cached_property
    def rank(self) -> tuple:
        """Fastest first, of equally fast ones the smallest; then what does not fit, smallest first.

        ZeRO levels may tie; the lowest comes first.
        """
        if self.fits:
            return False, self.time.total, self.memory.total, self.layout.mesh.zero
        return True, self.memory.total, self.time.total, self.layout.mesh.zero


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        ranked: the best of each family, the best first.
        num_layouts: that were estimated.
    """

    ranked: tuple[Candidate, ...]
    num_layouts: int


class Planner:
    """Estimates layouts of one job on one cluster.

    Args:
        job: what is trained.
        cluster: on what.
        limit_bytes: that a device may need.
        scale: of what layers compute, by a measurement.
    """

    def __init__(
        self,
        job: Job,
        cluster: Cluster,
        limit_bytes: float,
        scale: LayerScale = AsModelled(),
    ):
        self.job, self.cluster, self.limit_bytes = job, cluster, limit_bytes
        self._clock = Clock(job, cluster, scale)
        self._state = StateCounter(job)

    def estimate(self, layout: Layout, *, is_exact: bool = True) -> Candidate:
        """Time and memory of one layout.

        Args:
            layout: such as a mesh that the user names.
            is_exact: run a pipeline's table tick by tick, or take its closed form.
        Raises:
            InputError: it does not fit the job, with the equation that fails.
        """
        check_batch(
            layout.mesh,
            batch_size=self.job.batch_size,
            length=self.job.length,
            num_microbatches=layout.num_microbatches,
        )
        state = self._state(layout.mesh)
        time = self._clock.step(layout, state, is_exact=is_exact)
        memory = step_memory(self.job, layout, state)
        return Candidate(layout, time, memory, self.limit_bytes)

    def search(self, pinned: dict[str, Any]) -> Found:
        """The fastest layouts that fit; if none does, the smallest.

        Layouts are taken in the order of a bound: what their layers and the head take, evenly
        divided, without bubble, reduction or update. The search ends where the bound is above the
        time of enough families that fit.

        Args:
            pinned: fields of `MeshConfig`, `num_microbatches`, `remat` and `is_scanned` by name,
                with the value that they must have.
        Returns:
            What was found: nothing if no layout has the pinned values.
        Raises:
            InputError: a name cannot be pinned.
        """
        space = Space(self.job, self.cluster, pinned)
        bounds = [(self._clock.bound(core), core) for core in space.cores()]
        bounds.sort(key=lambda each: each[0])
        fastest, smallest = _Families(), _Families()
        num_layouts = 0
        for bound, core in bounds:
            if bound > fastest.last_kept:
                break
            for layout in self._possible(space, core):
                num_layouts += 1
                memory = step_memory(self.job, layout, self._state(layout.mesh))
                if memory.total <= self.limit_bytes:
                    candidate = self.estimate(layout, is_exact=False)
                    fastest.add(candidate.time.total, layout)
                else:
                    smallest.add(memory.total, layout)
        ranked = [self._refined(layout) for layout in fastest.kept() or smallest.kept()]
        return Found(tuple(sorted(ranked, key=lambda each: each.rank)), num_layouts)

    def _refined(self, layout: Layout) -> Candidate:
        """The exact estimate, with as many layers on each stage as makes the slowest fastest."""
        even, mesh = self.estimate(layout), layout.mesh
        if mesh.pipeline == 1 or mesh.num_chunks > 1 or mesh.stage_periods is not None:
            return even
        sizes = self._clock.balanced(layout)
        changed = dataclasses.replace(mesh, stage_periods=sizes)
        balanced = self.estimate(dataclasses.replace(layout, mesh=changed))
        is_better = balanced.fits >= even.fits and balanced.time.total < 0.999 * even.time.total
        return balanced if is_better else even

    def _possible(self, space: Space, core: Layout) -> Iterator[Layout]:
        """The layouts of a core whose dims divide over their axes."""
        for layout in space.variants(core):
            try:
                self._state(layout.mesh)
            except InputError:
                continue
            yield layout


class _Families:
    """The best layout of each family, by seconds or bytes."""

    def __init__(self):
        self._best: dict[tuple, tuple[float, Layout]] = {}
        self.last_kept = float("inf")  # above it a layout is not among those that are kept

    def add(self, cost: float, layout: Layout) -> None:
        """Keeps a layout if it is its family's best; of equal ones the first."""
        family = layout.family
        if family in self._best and self._best[family][0] <= cost:
            return
        self._best[family] = (cost, layout)
        if len(self._best) >= NUM_KEPT:
            self.last_kept = sorted(cost for cost, _ in self._best.values())[NUM_KEPT - 1]

    def kept(self) -> list[Layout]:
        """The best of the best families."""
        ordered = sorted(self._best.values(), key=lambda each: each[0])
        return [layout for _, layout in ordered[:NUM_KEPT]]
