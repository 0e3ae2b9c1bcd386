"""The modelled memory of a step on one device: state, stashed activations, workspace."""

import dataclasses

import numpy as np

from jaxscale.parallel.pipeline.schedule import Schedule
from jaxscale.planner.decoder import LayerWork
from jaxscale.planner.job import Job, Layout
from jaxscale.planner.state import StateBytes


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device; all stages run one program, so all need the same.

    Args:
        parameters, moments: between steps.
        gradients: as they add up.
        copies: the parameters in the compute type.
        stashed: what forwards keep for backwards, of all micro-batches in flight.
        workspace: of the layer or the head that is at work.
        host: in the host's memory, not in the sum.
    """

    parameters: float
    moments: float
    gradients: float
    copies: float
    stashed: float
    workspace: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Bytes on the device by name."""
        return {name: size for name, size in vars(self).items() if name != "host"}


def step_memory(
    job: Job,
    layout: Layout,
    state: StateBytes,
    schedule: Schedule | None,
) -> StepMemory:
    """The memory of a step.

    Args:
        job: what is trained.
        layout: how it is spread.
        state: its parameters under the layout's mesh.
        schedule: of the pipeline; None without one.
    """
    mesh = layout.mesh
    width = np.dtype(job.policy.compute).itemsize
    stages = layout.stages(job)
    tokens = layout.tokens(job)
    num_in_flight = schedule.num_residual_slots if schedule else 1
    kept = sum(_kept(job, layout, work, layout.remat) for work in job.period_work)
    period = tokens * kept * width
    stashed = num_in_flight * stages.num_slots * period
    stashed += tokens * width * sum(
        _kept(job, layout, work, layout.remat) for work in job.prefix_work
    )
    largest = max(_kept(job, layout, work, "none") for work in job.period_work)
    layer = tokens * width * largest
    workspace = layer * (0.8 if layout.remat == "none" else 1.7)
    is_converted = job.policy.parameters != job.policy.compute
    copies = 0.0
    if mesh.zero == 3:
        kept_periods = state.gathered if layout.remat == "none" else 2 * state.largest
        copies = (kept_periods + state.outside) * width
    elif is_converted:
        copies = state.whole * width
    is_summed = layout.num_microbatches > 1
    gradients = state.gradients if is_summed else state.held * width
    moments, host = state.moments, 0.0
    if mesh.is_optimizer_on_host:
        moments, host = state.moments / 8, state.moments
    return StepMemory(
        parameters=state.parameters,
        moments=moments,
        gradients=gradients,
        copies=copies,
        stashed=stashed,
        workspace=workspace + _head(job, layout, tokens, width),
        host=host,
    )


def _kept(
    job: Job,
    layout: Layout,
    work: LayerWork,
    remat: str,
) -> float:
    """Elements that a layer keeps of one token on one device."""
    mesh, rows = layout.mesh, 1.0
    if work.choices and mesh.expert > 1:
        # Buffers have room for the worst case.
        most = mesh.expert * min(work.choices, job.model.num_experts // mesh.expert)
        rows = most / work.choices
    return work.kept(remat).on_device(mesh.tensor, rows)


def _head(
    job: Job,
    layout: Layout,
    tokens: float,
    width: int,
) -> float:
    """Logits and their gradient of one chunk."""
    chunk = tokens / job.execution.num_loss_chunks
    return 2 * width * chunk * job.model.vocab_size / layout.mesh.tensor
