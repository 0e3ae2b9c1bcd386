"""The modelled time of a step: stages of layers, the pipeline's table, and what comes once."""

import dataclasses
import functools

import numpy as np

from jaxscale.parallel.mesh import DATA, EXPERT, PIPELINE, SEQUENCE
from jaxscale.planner.cluster import Cluster, group_of
from jaxscale.planner.decoder import LayerWork
from jaxscale.planner.job import Job, Layout
from jaxscale.planner.layer_scale import AsModelled, LayerScale
from jaxscale.planner.layer_time import (
    COMPUTED,
    IN_ZERO,
    MATMUL,
    MEMORY,
    PARTS,
    LayerClock,
)
from jaxscale.planner.pipeline import (
    FORWARD,
    WEIGHT,
    closed_seconds,
    exact_seconds,
    num_branches,
    num_ticks,
)
from jaxscale.planner.state import StateBytes

# As `layer_time.EXPOSED_TENSOR`: of ZeRO-3's gathers and sums, and of the sums after the backward.
# The former slow what they run beside; from 2026-11-27_two_h200_scaling.md, 2026-11-29_planner.md.
EXPOSED_ZERO, EXPOSED_REDUCTION = 0.95, 0.7
# A conditional: the host reads which branch it is before it starts one. From steps with empty
# tables in 2026-11-27_two_h200_scaling.md: 18 more ticks of three took 14.6 ms, of which 12.7
# exchange and store, and a fourth in each of 19 ticks 0.7 ms.
BRANCH_S = 35e-6
HEAD_EXCHANGES = (1, 2, 2)  # float32 numbers of a token that the stages sum for a shared loss


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Args:
        parts: by what they are spent on, on the slowest stage.
        stages: seconds that each pipeline stage works on all micro-batches.
    """

    parts: dict[str, float]
    stages: tuple[float, ...]

    @functools.cached_property
    def total(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())


class Clock:
    """Times the layouts of one job on one cluster.

    Args:
        job, cluster: these.
        scale: of what layers compute, by a measurement.
    """

    def __init__(
        self,
        job: Job,
        cluster: Cluster,
        scale: LayerScale = AsModelled(),
    ):
        self.job, self.cluster, self.scale = job, cluster, scale
        self._layers = LayerClock(job, cluster)
        # Seconds of a period and of the prefix, by all of a layout that they depend on.
        self._timed: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def bound(self, layout: Layout) -> float:
        """Seconds that no layout with these axes, micro-batches and remat can be below."""
        period, prefix = self._period_and_prefix(layout)
        seconds = self.job.model.num_periods * period.sum() + prefix.sum() + self._head(layout)
        return float(layout.num_microbatches * seconds / layout.mesh.pipeline)

    def balanced(self, layout: Layout) -> tuple[int, ...]:
        """Periods of each stage with which the slowest is fastest; all share the head."""
        period, prefix = self._period_and_prefix(layout)
        num_stages = layout.mesh.pipeline
        loads = np.full(num_stages, period.sum())
        loads[0] += prefix.sum()
        sizes = [1] * num_stages
        for _ in range(self.job.model.num_periods - num_stages):
            idlest = int(loads.argmin())
            loads[idlest] += period.sum()
            sizes[idlest] += 1
        return tuple(sizes)

    def step(
        self,
        layout: Layout,
        state: StateBytes,
        *,
        is_exact: bool,
    ) -> StepTime:
        """The time of a step.

        Args:
            layout: how the job is spread.
            state: bytes of its parameters and moments under the layout's mesh.
            is_exact: run the pipeline's table tick by tick, or take its closed form.
        """
        mesh, num = layout.mesh, layout.num_microbatches
        stages, head = self._stages(layout, state), self._shared_head(layout)
        by_chunk = stages.reshape(mesh.num_chunks, mesh.pipeline, 3, len(PARTS))
        by_device = by_chunk.sum((0, 2))
        by_device[:, MATMUL] += head
        totals = by_device.sum(1) * num
        slowest = int(totals.argmax())
        parts = dict(zip(PARTS, (by_device[slowest] * num).tolist(), strict=True))
        if mesh.pipeline > 1:
            passes = by_chunk.sum(3)
            seconds = exact_seconds if is_exact else closed_seconds
            whole = seconds(mesh, num, passes, head)
            parts["bubble"] = max(0.0, whole - float(totals[slowest]))
            parts["pipeline"] = self._between_stages(layout)
        parts |= self._once(layout, state)
        return StepTime(parts, tuple(totals.tolist()))

    def _stages(self, layout: Layout, state: StateBytes) -> np.ndarray:
        """Seconds [virtual stages, 3, parts] of one micro-batch, in the order of the layers.

        The state is that of all chunks of a device.
        """
        mesh = layout.mesh
        period, prefix = self._period_and_prefix(layout)
        sizes = np.array(layout.stages(self.job).sizes)
        stages = sizes[:, None, None] * period
        stages[0] += prefix
        if mesh.zero == 3:
            gathers = self._gathers(layout, state) / mesh.num_chunks
            stages[:, :2] += gathers[:, None] * _only(IN_ZERO)
        if layout.num_microbatches > 1:
            # Each micro-batch's gradients are added to the sums.
            seconds = 2 * state.gradients / self._layers.memory_bandwidth
            stages[:, WEIGHT, MEMORY] += seconds / mesh.num_chunks
        return stages

    def _shared_head(self, layout: Layout) -> float:
        """A stage's share of the head, all of it where the stages do not divide the vocabulary."""
        mesh = layout.mesh
        rest = self.job.model.vocab_size % (mesh.pipeline * mesh.tensor)
        return self._head(layout) / (1 if rest else mesh.pipeline)

    def _period_and_prefix(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        mesh, tokens = layout.mesh, layout.tokens(self.job)
        key = (mesh.sizes, mesh.ring, mesh.expert_axis, tokens, layout.remat)
        if key not in self._timed:
            self._timed[key] = tuple(
                sum(
                    (self._layer(each, layout) for each in layers),
                    np.zeros((3, len(PARTS))),
                )
                for layers in (self.job.period_work, self.job.prefix_work)
            )
        return self._timed[key]

    def _layer(self, work: LayerWork, layout: Layout) -> np.ndarray:
        """As `LayerClock.layer`, what is computed as it was measured."""
        given = (work, layout.tokens(self.job), layout.remat, layout.mesh)
        seconds, scale = self._layers.layer(*given), self.scale.layer(*given)
        seconds[FORWARD, COMPUTED] *= scale.forward
        seconds[FORWARD + 1 :, COMPUTED] *= scale.backward
        return seconds

    def _head(self, layout: Layout) -> float:
        """The unembedding with the loss, forward and backward."""
        tokens, tensor = layout.tokens(self.job), layout.mesh.tensor
        return self._layers.head(tokens, tensor) * self.scale.head(tokens, tensor)

    def _gathers(self, layout: Layout, state: StateBytes) -> np.ndarray:
        """ZeRO-3's exchanges of a device and micro-batch: seconds of forward and backward.

        A pipeline's backward is a program of its own, which gathers again.
        """
        group = group_of(self.cluster, layout.mesh, layout.mesh.zero_axes)
        gather = group.all_gather_s(state.gathered * self.job.width)
        reduce = group.reduce_scatter_s(state.gathered * self.job.reduction_width)
        is_again = layout.remat != "none" or layout.mesh.pipeline > 1
        return EXPOSED_ZERO * np.array([gather, reduce + gather * is_again])

    def _between_stages(self, layout: Layout) -> float:
        """What ticks cost beside passes: exchanges, the head's among them, slots and branches."""
        mesh, num = layout.mesh, layout.num_microbatches
        own = layout.tokens(self.job) / mesh.tensor
        num_bytes = own * self.job.model.model_dim * self.job.width
        stages = group_of(self.cluster, mesh, (PIPELINE,))
        # An activation and a cotangent, each sent, and stored where it arrives.
        stored = 2 * num_bytes / self._layers.memory_bandwidth
        ticks = 2 * num_ticks(mesh, num) * (stages.permute_s(num_bytes) + stored)
        head = 2 * stages.all_reduce_s(num_bytes)
        head += sum(stages.all_reduce_s(4 * own * each) for each in HEAD_EXCHANGES)
        return ticks + num * head + num_branches(mesh, num) * BRANCH_S

    def _once(self, layout: Layout, state: StateBytes) -> dict[str, float]:
        """Reduction of the gradients, update, and the parameters made whole again."""
        mesh, job = layout.mesh, self.job
        parts = {"reduction": 0.0}
        if mesh.zero < 3 and mesh.num_batch_shards * mesh.sequence > 1:
            replicas = group_of(self.cluster, mesh, (DATA, EXPERT, SEQUENCE))
            sums = replicas.reduce_scatter_s(state.held * job.reduction_width)
            # Under ZeRO each device updates its share of the parameters, which are gathered when
            # there is nothing left to compute; without it the second half is of sums, too.
            again = EXPOSED_REDUCTION * replicas.all_gather_s(state.held * job.reduction_width)
            if mesh.zero:
                again = replicas.all_gather_s(state.held * job.parameter_width)
            parts["reduction"] = EXPOSED_REDUCTION * sums + again
        parts["update"] = self._updated_bytes(layout, state) / self._layers.memory_bandwidth
        if mesh.is_optimizer_on_host:
            parts["host"] = 2 * state.moments / self.cluster.device.host_bandwidth
        return parts

    def _updated_bytes(self, layout: Layout, state: StateBytes) -> float:
        """Bytes read and written once a step: the norms that are reported, AdamW, and stacks."""
        job = self.job
        update = 2 * (state.moments + state.trained) + state.gradients
        # The norm of the parameters is taken where they are converted, if they are.
        converted = state.parameters * job.width / job.parameter_width
        norms = state.gradients + state.parameters
        norms += converted if job.width != job.parameter_width else 0.0
        # With one micro-batch each layer's gradients are copied into the array of all layers'.
        stacks = 2 * state.held * job.width if layout.num_microbatches == 1 else 0.0
        return update + norms + stacks


def _only(part: int) -> np.ndarray:
    return np.eye(len(PARTS))[part]
