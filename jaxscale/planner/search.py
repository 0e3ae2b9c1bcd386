"""All ways to spread a job on a cluster, estimated and ranked."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from jaxscale.parallel.mesh import AXES, EXPERT, TENSOR, MeshConfig, check_batch
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.job import Job, Layout
from jaxscale.planner.memory import StepMemory, step_memory
from jaxscale.planner.state import StateCounter
from jaxscale.planner.step_time import Clock, StepTime
from jaxscale.types import InputError, check_choice

# What a layer keeps for its backward: all in unrolled layers, or its input in a loop over layers.
EXECUTIONS = (("none", False), ("dots", False), ("full", True))
SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2))
NUM_EXACT = 64  # of the best by closed forms, whose tables are run tick by tick
PINNABLE = (
    *AXES,
    "zero",
    "ring",
    "schedule",
    "num_chunks",
    "stage_periods",
    "expert_axis",
    "expert_exchange",
    "is_optimizer_on_host",
    "num_microbatches",
    "remat",
    "is_scanned",
)


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
    def fits(self) -> bool:
        """Whether its memory is within the limit."""
        return self.memory.total <= self.limit_bytes


class Planner:
    """Estimates layouts of one job on one cluster.

    Args:
        job: what is trained.
        cluster: on what.
        limit_bytes: that a device may need.
    """

    def __init__(self, job: Job, cluster: Cluster, limit_bytes: float):
        self.job, self.cluster, self.limit_bytes = job, cluster, limit_bytes
        self._clock = Clock(job, cluster)
        self._state = StateCounter(job)

    def estimate(self, layout: Layout, *, is_exact: bool = True) -> Candidate:
        """Time and memory of one layout.

        Args:
            layout: such as a mesh that the user names.
            is_exact: run a pipeline's table tick by tick, or take its closed form.
        Raises:
            InputError: it does not fit the job, with the equation that fails.
        """
        self._check(layout)
        state = self._state(layout.mesh)
        schedule = self._clock.schedule(layout)
        time = self._clock.step(layout, state, is_exact=is_exact)
        memory = step_memory(self.job, layout, state, schedule)
        return Candidate(layout, time, memory, self.limit_bytes)

    def search(self, pinned: dict[str, Any]) -> list[Candidate]:
        """All layouts, those that fit first, the fastest first; of those that do not, the smallest.

        Args:
            pinned: fields of `MeshConfig`, `num_microbatches`, `remat` and `is_scanned` by name,
                with the value that they must have.
        Raises:
            InputError: a name cannot be pinned, or no layout has the pinned values.
        """
        for name in pinned:
            check_choice("pinned", name, PINNABLE)
        found = [
            self.estimate(layout, is_exact=False) for layout in self._layouts(pinned)
        ]
        if not found:
            expected = f"values that {self.cluster.num_devices} devices and the model allow"
            raise InputError("pinned", pinned, expected)
        found.sort(key=_rank)
        best = [self.estimate(each.layout) for each in found[:NUM_EXACT]]
        return sorted(best, key=_rank) + found[NUM_EXACT:]

    def _check(self, layout: Layout) -> None:
        check_batch(
            layout.mesh,
            batch_size=self.job.batch_size,
            length=self.job.length,
            num_microbatches=layout.num_microbatches,
        )

    def _layouts(self, pinned: dict[str, Any]) -> Iterator[Layout]:
        """Every layout that the job allows."""
        executions = _allowed(EXECUTIONS, ("remat", "is_scanned"), pinned)
        for mesh in self._meshes(pinned):
            for num, (remat, is_scanned) in itertools.product(
                self._num_microbatches(mesh, pinned), executions
            ):
                if mesh.schedule == "zero_bubble" and is_scanned:
                    continue
                yield Layout(mesh, num, remat, is_scanned)

    def _num_microbatches(self, mesh: MeshConfig, pinned: dict[str, Any]) -> list[int]:
        """Powers of two by which the rows of a device divide."""
        if "num_microbatches" in pinned:
            return [pinned["num_microbatches"]]
        rows, rest = divmod(self.job.batch_size, mesh.num_batch_shards)
        if rest:
            return []
        powers = [2**k for k in range(rows.bit_length())]
        found = [num for num in powers if rows % num == 0]
        if mesh.num_chunks > 1:
            found = [num for num in found if num % mesh.pipeline == 0]
        return [num for num in found if num >= mesh.pipeline]

    def _meshes(self, pinned: dict[str, Any]) -> Iterator[MeshConfig]:
        """Every mesh of all devices whose axes divide what they shard."""
        for sizes in self._sizes(pinned):
            for rest in self._uses(sizes, pinned):
                mesh = MeshConfig(**sizes, **rest)
                if self._divides(mesh):
                    yield mesh

    def _sizes(self, pinned: dict[str, Any]) -> Iterator[dict[str, int]]:
        for sizes in _factorisations(self.cluster.num_devices, len(AXES)):
            named = dict(zip(AXES, sizes, strict=True))
            is_pinned = all(pinned.get(axis, size) == size for axis, size in named.items())
            if is_pinned and self._is_sensible(named, pinned):
                yield named

    def _is_sensible(self, sizes: dict[str, int], pinned: dict[str, Any]) -> bool:
        """Whether sizes are worth a look, by the cheap tests."""
        model, batch = self.job.model, self.job.batch_size
        if sizes["expert"] > 1 and model.num_experts % sizes["expert"]:
            return False
        if sizes["expert"] > 1 and not model.num_experts:
            return False
        is_wide = sizes["tensor"] > self.cluster.devices_per_host and "tensor" not in pinned
        is_long = sizes["pipeline"] > model.num_periods
        return not (is_wide or is_long or batch % (sizes["data"] * sizes["expert"]))

    def _uses(self, sizes: dict[str, int], pinned: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """How the axes of such sizes are used: ZeRO, schedule, ring, where experts lie."""
        num_replicas = sizes["data"] * sizes["sequence"]
        zeros = (0, 1, 2, 3) if num_replicas > 1 else (0,)
        rings = {1, sizes["sequence"]}
        is_moe_alone = self.job.model.num_experts and sizes["expert"] == 1
        expert_axes = (EXPERT, TENSOR) if is_moe_alone and sizes["tensor"] > 1 else (EXPERT,)
        exchanges = ("ragged",) if sizes["expert"] > 1 else ("dense",)
        schedules = SCHEDULES if sizes["pipeline"] > 1 else (("1f1b", 1),)
        choices = itertools.product(zeros, sorted(rings), expert_axes, exchanges, schedules)
        for zero, ring, expert_axis, exchange, (schedule, chunks) in choices:
            uses = dict(
                zero=zero,
                ring=ring,
                expert_axis=expert_axis,
                expert_exchange=exchange,
                schedule=schedule,
                num_chunks=chunks,
            )
            if all(pinned.get(name, value) == value for name, value in uses.items()):
                extra = {name: pinned[name] for name in ("stage_periods", "is_optimizer_on_host") if name in pinned}
                yield uses | extra

    def _divides(self, mesh: MeshConfig) -> bool:
        """Whether the sharding rules allow a mesh."""
        try:
            self._state(mesh)
        except InputError:
            return False
        per_member = self.job.length % (mesh.sequence * mesh.tensor)
        return not per_member and not (mesh.ring > 1 and self.job.length % (2 * mesh.ring))


def _rank(candidate: Candidate) -> tuple[bool, float]:
    if candidate.fits:
        return False, candidate.time.total
    return True, candidate.memory.total


def _allowed(
    choices: tuple[tuple, ...],
    names: tuple[str, ...],
    pinned: dict[str, Any],
) -> list[tuple]:
    """The choices that agree with what is pinned; if none does, what is pinned with each rest."""
    found = [
        tuple(pinned.get(name, value) for name, value in zip(names, choice, strict=True))
        for choice in choices
    ]
    return list(dict.fromkeys(found))


@functools.cache
def _factorisations(number: int, length: int) -> tuple[tuple[int, ...], ...]:
    """All ordered ways to write a number as a product of `length` numbers."""
    if length == 1:
        return ((number,),)
    return tuple(
        (first, *rest)
        for first in range(1, number + 1)
        if number % first == 0
        for rest in _factorisations(number // first, length - 1)
    )
