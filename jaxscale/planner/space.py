"""The layouts that a job and a cluster allow."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from jaxscale.models.execution import ByChunk
from jaxscale.parallel.mesh import AXES, EXPERT, TENSOR, MeshConfig
from jaxscale.planner.cluster import Cluster
from jaxscale.planner.job import Job, Layout
from jaxscale.types import check_choice

# What a layer keeps for its backward: all or its matmuls' outputs in unrolled layers, or its input
# in a loop over layers. Unrolled, XLA starts to recompute so early that it saves no memory.
EXECUTIONS = (("none", False), ("dots", False), ("full", True))
SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2))
# Level 2 takes as long as 1 and as much memory: gradients add up whole, and XLA makes a
# reduce-scatter of the sum of which each device needs its share. Pinned, it is taken.
ZEROS = (0, 1, 3)
GIVEN_ONLY = ("stage_periods", "is_optimizer_on_host")  # never tried unless they are pinned
OF_LAYOUT = ("num_microbatches", "remat", "is_scanned")
PINNABLE = (
    *AXES,
    "zero",
    "ring",
    "schedule",
    "num_chunks",
    "expert_axis",
    *GIVEN_ONLY,
    *OF_LAYOUT,
)


@dataclasses.dataclass(frozen=True)
class Space:
    """All layouts with some values pinned.

    Args:
        job: what is trained.
        cluster: on what; all its devices are used.
        pinned: values by name, of PINNABLE.
    Raises:
        InputError: a name cannot be pinned.
    """

    job: Job
    cluster: Cluster
    pinned: dict[str, Any]

    def __post_init__(self):
        for name in self.pinned:
            check_choice("pinned", name, PINNABLE)

    def cores(self) -> Iterator[Layout]:
        """Layouts up to what layers take the same time under: ZeRO level and schedule."""
        for sizes in self._sizes():
            for ring, expert_axis in self._uses(sizes):
                mesh = MeshConfig(**sizes, zero=0, ring=ring, expert_axis=expert_axis)
                for num in self._num_microbatches(mesh):
                    for remat, is_scanned in self._executions():
                        yield Layout(mesh, num, remat, is_scanned)

    def variants(self, core: Layout) -> Iterator[Layout]:
        """The layouts of a core."""
        for mesh in self._meshes(core.mesh):
            # Split from its backward, a weight gradient needs what a remat would not keep, and a
            # loop over layers cannot be split.
            is_looped = core.remat != "none" or core.is_scanned
            is_in_vain = mesh.schedule == "zero_bubble" and is_looped
            is_uneven = mesh.num_chunks > 1 and core.num_microbatches % mesh.pipeline
            if not is_in_vain and not is_uneven:
                yield dataclasses.replace(core, mesh=mesh)

    def _meshes(self, mesh: MeshConfig) -> tuple[MeshConfig, ...]:
        return _variants(mesh, self.job.model.num_periods, tuple(self.pinned.items()))

    def _sizes(self) -> Iterator[dict[str, int]]:
        for sizes in _factorisations(self.cluster.num_devices, len(AXES)):
            named = dict(zip(AXES, sizes, strict=True))
            is_pinned = all(self.pinned.get(axis, size) == size for axis, size in named.items())
            if is_pinned and self._is_sensible(named):
                yield named

    def _is_sensible(self, sizes: dict[str, int]) -> bool:
        """Whether the batch, the layers, the experts and the tokens divide."""
        model = self.job.model
        num_experts, tokens = model.num_experts, self.job.length
        across_hosts = sizes["tensor"] > self.cluster.devices_per_host
        if across_hosts and "tensor" not in self.pinned:
            return False
        if sizes["expert"] > 1 and (not num_experts or num_experts % sizes["expert"]):
            return False
        if sizes["pipeline"] > (model.num_periods if self.job.is_staged else 1):
            return False
        if isinstance(self.job.execution.strategy, ByChunk) and sizes["tensor"] > 1:
            return False
        num_rows = self.job.batch_size % (sizes["data"] * sizes["expert"])
        num_shares = sizes["sequence"] * sizes["tensor"]
        num_tokens = tokens % (num_shares * self.job.execution.num_loss_chunks)
        return not num_rows and not num_tokens

    def _uses(self, sizes: dict[str, int]) -> Iterator[tuple[int, str]]:
        """Ring or Ulysses, and where experts lie."""
        ring = sizes["sequence"]
        rings = [1, ring] if ring > 1 and self._may_be_rings(ring) else [1]
        expert_axes = [EXPERT]
        if self.job.model.num_experts and sizes["expert"] == 1 and sizes["tensor"] > 1:
            expert_axes.append(TENSOR)
        return itertools.product(
            self._given("ring", rings), self._given("expert_axis", expert_axes)
        )

    def _may_be_rings(self, size: int) -> bool:
        """Whether a ring's attention, which is causal, does what the layers ask of theirs."""
        model, execution = self.job.model, self.job.execution
        has_layouts = any(layer.attention.layout for layer in model.layers)
        is_plain = model.is_causal and not has_layouts and execution.attention is None
        return is_plain and self.job.length % (2 * size) == 0

    def _given(self, name: str, choices: list) -> list:
        return [self.pinned[name]] if name in self.pinned else choices

    def _num_microbatches(self, mesh: MeshConfig) -> list[int]:
        """Powers of two by which a device's rows divide, at least as many as stages."""
        rows = self.job.batch_size // mesh.num_batch_shards
        powers = [2**k for k in range(rows.bit_length())]
        fitting = [num for num in powers if rows % num == 0 and num >= mesh.pipeline]
        given = self._given("num_microbatches", fitting)
        return [num for num in given if rows % num == 0]

    def _executions(self) -> list[tuple[str, bool]]:
        """What is recomputed and whether layers are looped over."""
        pinned = self.pinned
        wanted = [
            (pinned.get("remat", remat), pinned.get("is_scanned", is_scanned))
            for remat, is_scanned in EXECUTIONS
            if pinned.get("remat", remat) in (remat, "names")
        ]
        return list(dict.fromkeys(wanted))


@functools.cache
def _variants(
    mesh: MeshConfig,
    num_periods: int,
    pinned: tuple[tuple[str, Any], ...],
) -> tuple[MeshConfig, ...]:
    """Meshes of the same axes with every ZeRO level and schedule that is not pinned."""
    given = dict(pinned)
    zeros = ZEROS if mesh.data * mesh.sequence > 1 else (0,)
    zeros = (given["zero"],) if "zero" in given else zeros
    schedules = SCHEDULES if mesh.pipeline > 1 else SCHEDULES[1:2]
    if given.get("num_chunks", 1) > 1:
        schedules = (("interleaved", given["num_chunks"]),)
    rest = {
        name: given[name] for name in ("stage_periods", "is_optimizer_on_host") if name in given
    }
    found = []
    for zero, (schedule, num_chunks) in itertools.product(zeros, schedules):
        uses = {"schedule": schedule, "num_chunks": num_chunks}
        is_pinned = all(given.get(name, value) == value for name, value in uses.items())
        # A stage with chunks of unequal length waits in every tick.
        is_even = num_chunks == 1 or num_periods % (mesh.pipeline * num_chunks) == 0
        if is_pinned and is_even:
            found.append(dataclasses.replace(mesh, zero=zero, **uses, **rest))
    return tuple(found)


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
