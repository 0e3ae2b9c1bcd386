"""The modelled time of a step: FLOPs and bytes over the device table, collectives, bubble."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jaxscale.parallel.mesh import DATA, EXPERT, PIPELINE, SEQUENCE, TENSOR, MeshConfig
from jaxscale.parallel.pipeline.schedule import Schedule, duration, make_schedule
from jaxscale.planner.cluster import Cluster, group_of
from jaxscale.planner.decoder import BACKWARD_PASSES, FORWARD_PASSES, LayerWork
from jaxscale.planner.job import Job, Layout
from jaxscale.planner.state import StateBytes

# Shares of exchanges that have nothing to compute beside them, from
# experiments/results/2026-11-27_two_h200_scaling.md.
EXPOSED_TENSOR, EXPOSED_TENSOR_IN_PIPELINE = 0.8, 1.0
EXPOSED_ZERO, EXPOSED_REDUCTION = 0.6, 0.7
ATTENTION_BACKWARD = 2.5  # times the FLOPs of its forward (arXiv 2205.14135, section 4)
SHORTEST_MATMUL = 512  # tokens; matmuls of fewer rows take as long


@dataclasses.dataclass(frozen=True)
class Parts:
    """Seconds of some work by what they are spent on."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    recompute: float = 0.0
    tensor: float = 0.0
    sequence: float = 0.0
    expert: float = 0.0
    zero: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, float]:
        """Seconds by name."""
        return vars(self)

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def __mul__(self, factor: float) -> "Parts":
        return Parts(*(factor * each for each in vars(self).values()))


@dataclasses.dataclass(frozen=True)
class Passes:
    """Forward, backward (of the input) and weight gradient of some layers."""

    forward: Parts = Parts()
    backward: Parts = Parts()
    weight: Parts = Parts()

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(
            self.forward + other.forward,
            self.backward + other.backward,
            self.weight + other.weight,
        )

    def __mul__(self, factor: float) -> "Passes":
        return Passes(self.forward * factor, self.backward * factor, self.weight * factor)

    @property
    def total(self) -> Parts:
        """All three."""
        return self.forward + self.backward + self.weight


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Args:
        parts: by what they are spent on, on the slowest stage.
        stages: seconds that each pipeline stage works on all micro-batches.
    """

    parts: dict[str, float]
    stages: tuple[float, ...]

    @property
    def total(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())


class Clock:
    """Times the layouts of one job on one cluster; layers are timed once for layouts alike."""

    def __init__(self, job: Job, cluster: Cluster):
        self.job, self.cluster = job, cluster
        self._layer = functools.cache(self._layer)
        self._made = functools.cache(make_schedule)

    def schedule(self, layout: Layout) -> Schedule | None:
        """The pipeline's schedule; None without a pipeline."""
        mesh = layout.mesh
        if mesh.pipeline == 1:
            return None
        return self._made(mesh.schedule, mesh.pipeline, mesh.num_chunks, layout.num_microbatches)

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
        stages = self._stages(layout, state)
        mesh, num = layout.mesh, layout.num_microbatches
        totals = [stage.total.total for stage in stages]
        by_device = np.reshape(totals, (mesh.num_chunks, mesh.pipeline)).sum(0)
        slowest = int(by_device.argmax())
        of_slowest = stages[slowest :: mesh.pipeline]
        busy = functools.reduce(Passes.__add__, of_slowest).total * num
        parts = dict(busy.as_dict())
        if mesh.pipeline > 1:
            ticks = self._exact(layout, stages) if is_exact else self._closed(layout, stages)
            parts["bubble"] = max(0.0, ticks - busy.total)
            parts["pipeline"] = self._stage_exchanges(layout)
        parts |= self._end(layout, state)
        return StepTime(parts, tuple(map(float, by_device * num)))

    def _stages(self, layout: Layout, state: StateBytes) -> list[Passes]:
        """One micro-batch through each virtual stage, in the order of the layers."""
        job, mesh = self.job, layout.mesh
        shape = (layout.tokens(job), layout.remat, dataclasses.replace(mesh, stage_periods=None))
        period = self._layers(job.period_work, *shape)
        stages = [period * size for size in layout.stages(job).sizes]
        stages[0] += self._layers(job.prefix_work, *shape)
        stages[-1] += self._head(layout)
        if mesh.zero == 3:
            gathered = self._gathers(layout, state)
            stages = [stage + gathered * (1 / len(stages)) for stage in stages]
        return stages

    def _layers(
        self,
        layers: Sequence[LayerWork],
        tokens: float,
        remat: str,
        mesh: MeshConfig,
    ) -> Passes:
        return sum((self._layer(each, tokens, remat, mesh) for each in layers), Passes())

    def _layer(
        self,
        work: LayerWork,
        tokens: float,
        remat: str,
        mesh: MeshConfig,
    ) -> Passes:
        """One micro-batch through one layer on one device."""
        device = self.cluster.device
        share = 1 / mesh.tensor
        matmul = max(tokens, SHORTEST_MATMUL) * work.matmul_flops * share / self._matmul_flops
        experts = tokens * work.expert_flops * share
        matmul += experts / (device.matmul_flops * device.expert_share)
        attention = tokens * work.attention_flops * share
        attention /= device.matmul_flops * device.attention_share
        elements = tokens * work.all.on_device(mesh.tensor)
        memory = elements * self._width / (device.memory_bandwidth * device.memory_share)
        exchanges = self._exchanges(work, tokens, mesh, attention)
        forward = Parts(matmul, attention, memory * FORWARD_PASSES) + exchanges
        again = Parts()
        if remat == "dots":
            again = Parts(recompute=memory * FORWARD_PASSES)
        elif remat != "none":
            again = Parts(recompute=matmul + attention + memory * FORWARD_PASSES) + exchanges
        backward = Parts(matmul, attention * ATTENTION_BACKWARD, memory * BACKWARD_PASSES)
        return Passes(forward, backward + exchanges + again, Parts(matmul=matmul))

    @property
    def _matmul_flops(self) -> float:
        device = self.cluster.device
        if self.job.policy.compute == "float32":
            return device.float32_flops
        return device.matmul_flops * device.matmul_share

    @property
    def _width(self) -> int:
        """Bytes of an activation."""
        return np.dtype(self.job.policy.compute).itemsize

    def _exchanges(
        self,
        work: LayerWork,
        tokens: float,
        mesh: MeshConfig,
        attention: float,
    ) -> Parts:
        """What a layer's forward waits for others; its backward waits as long."""
        num_bytes = tokens * self.job.model.model_dim * self._width
        tensor = self._group(mesh, (TENSOR,))
        exposed = EXPOSED_TENSOR if mesh.pipeline == 1 else EXPOSED_TENSOR_IN_PIPELINE
        # A gather before and a reduce-scatter after attention and feed-forward.
        waits = 4 * tensor.all_gather_s(num_bytes) * exposed
        sequence = 0.0
        if mesh.ring < mesh.sequence:
            members = dataclasses.replace(mesh, sequence=mesh.sequence // mesh.ring)
            heads = tokens * work.exchanged_kv * self._width / mesh.tensor
            sequence += self._group(members, (SEQUENCE,)).all_to_all_s(heads)
        if mesh.ring > 1:
            passed = tokens * work.ring_kv * self._width / mesh.tensor * (mesh.ring - 1)
            permutes = self._group(mesh, (SEQUENCE,)).permute_s(passed)
            sequence += max(0.0, permutes - attention)
        expert = 0.0
        if work.choices and mesh.expert > 1:
            rows = tokens * self._rows_over_tokens(work, mesh)
            buffer = rows * self.job.model.model_dim * self._width
            expert = 2 * self._group(mesh, (EXPERT,)).all_to_all_s(buffer)
        return Parts(tensor=waits, sequence=sequence, expert=expert)

    def _rows_over_tokens(self, work: LayerWork, mesh: MeshConfig) -> float:
        """Rows that the exchange of experts carries for each token."""
        if mesh.expert_exchange == "ragged":
            return work.choices
        return mesh.expert * min(work.choices, self.job.model.num_experts // mesh.expert)

    def _head(self, layout: Layout) -> Passes:
        """The unembedding with the loss: its gradient is made in the forward."""
        tokens, tensor = layout.tokens(self.job), layout.mesh.tensor
        flops = 3 * tokens * self.job.head_work.matmul_flops / tensor
        return Passes(forward=Parts(matmul=flops / self._matmul_flops))

    def _gathers(self, layout: Layout, state: StateBytes) -> Passes:
        """ZeRO-3: each micro-batch gathers a stage's parameters and reduces their gradients."""
        group = self._group(layout.mesh, layout.mesh.zero_axes)
        gather = Parts(zero=EXPOSED_ZERO * group.all_gather_s(state.gathered * self._width))
        reduction = np.dtype(self.job.policy.reduction).itemsize
        reduce = Parts(zero=EXPOSED_ZERO * group.reduce_scatter_s(state.gathered * reduction))
        is_again = layout.remat != "none"
        return Passes(gather, reduce + gather * is_again)

    def _stage_exchanges(self, layout: Layout) -> float:
        """Activations and cotangents after each tick."""
        mesh = layout.mesh
        schedule = self.schedule(layout)
        num_bytes = layout.tokens(self.job) * self.job.model.model_dim * self._width / mesh.tensor
        return 2 * schedule.num_ticks * self._group(mesh, (PIPELINE,)).permute_s(num_bytes)

    def _exact(self, layout: Layout, stages: list[Passes]) -> float:
        mesh = layout.mesh
        shape = (mesh.num_chunks, mesh.pipeline)
        schedule = self.schedule(layout)
        passes = ("forward", "backward", "weight")
        seconds = [[getattr(stage, each).total for stage in stages] for each in passes]
        return duration(schedule, *(np.reshape(each, shape) for each in seconds))

    def _closed(self, layout: Layout, stages: list[Passes]) -> float:
        """Bubbles of the schedules' docstrings, with the slowest stage in the steady state."""
        mesh, num = layout.mesh, layout.num_microbatches
        totals = [stage.total.total for stage in stages]
        by_device = np.reshape(totals, (mesh.num_chunks, mesh.pipeline)).sum(0)
        slowest = stages[int(np.argmax(totals))]
        ramp = (mesh.pipeline - 1) * slowest.total.total
        if mesh.schedule == "zero_bubble":
            ramp -= 2 * (mesh.pipeline - 1) * slowest.weight.total
        return float(num * by_device.max() + ramp)

    def _end(self, layout: Layout, state: StateBytes) -> dict[str, float]:
        """What comes once a step: reduction of the gradients, update, parameters made whole."""
        mesh, device, job = layout.mesh, self.cluster.device, self.job
        reduction = np.dtype(job.policy.reduction).itemsize
        parts = {"reduction": 0.0}
        replicas = self._group(mesh, (DATA, EXPERT, SEQUENCE))
        if mesh.zero < 3:
            # Under ZeRO each device takes its share of the sums and updates it, then the
            # parameters are gathered: as many bytes as the all-reduce.
            sums = replicas.reduce_scatter_s(state.held * reduction)
            back = state.held * np.dtype(job.policy.parameters if mesh.zero else job.policy.reduction).itemsize
            parts["reduction"] = EXPOSED_REDUCTION * (sums + replicas.all_gather_s(back))
        passes = 2 * (state.moments + state.trained) + state.gradients
        parts["update"] = passes / (device.memory_bandwidth * device.memory_share)
        if mesh.is_optimizer_on_host:
            parts["host"] = 2 * state.moments / device.host_bandwidth
        return parts

    def _group(self, mesh: MeshConfig, axes: tuple[str, ...]):
        return group_of(self.cluster, mesh, axes)
