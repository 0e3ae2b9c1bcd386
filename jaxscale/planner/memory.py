"""The modelled memory of a step on one device: state, what is kept for the backward, workspace.

What XLA lays out beside the state is not a sum of tensors that one could count: it depends on the
order in which XLA runs the step. The factors below were fitted to steps that jax 0.11 compiled for
H200s, see docs/planner.md for how far off they are. `jaxscale compile` gives the compiler's figure.
"""

import dataclasses
import functools

import jax

from jaxscale.planner.decoder import Kept, LayerWork
from jaxscale.planner.job import Job, Layout
from jaxscale.planner.pipeline import num_in_flight
from jaxscale.planner.state import StateBytes

# What is really kept, over what `decoder` counts, when nothing is recomputed, by experts and by the
# rest of a layer. A loop over layers stacks an activation's intermediate results too, but those of
# experts are recomputed from their inputs.
KEPT_UNROLLED = {"layer": 1.115, "experts": 0.80}
KEPT_SCANNED = {"layer": 1.64, "experts": 0.56}
KEPT_SCANNED_WITH_EXCHANGE = {"layer": 1.64, "experts": 0.63}
# Of what unrolled layers should recompute, XLA keeps so much anyway: it starts early to recompute.
KEPT_ANYWAY = {"none": 0.0, "dots": 0.45, "full": 0.75, "names": 0.75}
# A layer at work, over what it keeps when nothing is recomputed.
WORKSPACE, WORKSPACE_IN_PIPELINE = 1.35, 1.25
# Of experts that get tokens of several devices, most of whose rows are empty.
WORKSPACE_WITH_EXCHANGE = 0.86
# The same in a loop that recomputes the layer, but for its experts.
WORKSPACE_RECOMPUTED = 1.6
# Of experts' gradients what lies beside their sums in a pipeline's unrolled stage.
EXPERT_GRADIENTS = 0.43
# Attention's output that a remat keeps, with what else of it the kernel's backward reads.
KEPT_ATTENTION = 1.75
# Compiled by jax 0.10, a pipeline's step has its slots twice.
COPIES_OF_SLOTS = 1 if jax.__version_info__ >= (0, 11) else 2
NUM_SLOTS_BETWEEN_STAGES = 4  # activations and cotangents that wait


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device; all stages run one program, so all need the same.

    Args:
        parameters, moments: between steps.
        gradients: as they add up.
        copies: parameters in the compute type, or gathered.
        stashed: what forwards keep for backwards, of all micro-batches in flight.
        workspace: of the layer, the head or the update that is at work.
        host: in the host's memory, not in the sum.
    """

    parameters: float
    moments: float
    gradients: float
    copies: float
    stashed: float
    workspace: float
    host: float = 0.0

    @functools.cached_property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts().values())

    def corrected(self, total: float) -> "StepMemory":
        """The same with the compiler's total; what lies beside the state is scaled to it."""
        state = self.parameters + self.moments
        scale = (total - state) / (self.total - state)
        return dataclasses.replace(
            self,
            gradients=self.gradients * scale,
            copies=self.copies * scale,
            stashed=self.stashed * scale,
            workspace=self.workspace * scale,
        )

    def parts(self) -> dict[str, float]:
        """Bytes on the device by name."""
        names = ("parameters", "moments", "gradients", "copies", "stashed", "workspace")
        return {name: getattr(self, name) for name in names}


def step_memory(job: Job, layout: Layout, state: StateBytes) -> StepMemory:
    """The memory of a step.

    Args:
        job: what is trained.
        layout: how it is spread.
        state: its parameters under the layout's mesh.
    """
    needs = _Needs(job, layout, state)
    moments = state.moments
    if layout.mesh.is_optimizer_on_host:
        # The moments of a leaf come to the device together, and new ones are made beside them.
        moments *= 1.5 * state.largest_leaf / state.whole
    if layout.mesh.pipeline > 1:
        temporaries = needs.of_pipeline()
    elif layout.is_scanned:
        temporaries = needs.of_loop()
    else:
        temporaries = needs.of_unrolled()
    host = sum(host_memory(job, layout, state).values())
    return StepMemory(state.parameters, moments, host=host, **temporaries)


def host_memory(job: Job, layout: Layout, state: StateBytes) -> dict[str, float]:
    """What rests in a device's share of its host, in bytes by name; arguments as `step_memory`.

    Tensors that `ExecutionConfig.offloaded_names` sends there are not counted.
    """
    execution, found = job.execution, {}
    if layout.mesh.is_optimizer_on_host:
        found["moments"] = state.moments
    if execution.checkpoint_every > 1 and execution.checkpoint_place == "host":
        found["groups' inputs"] = _Needs(job, layout, state).group_inputs
    return found


@dataclasses.dataclass(frozen=True)
class _Needs:
    """The temporaries of one layout, by how its layers run."""

    job: Job
    layout: Layout
    state: StateBytes

    def of_pipeline(self) -> dict[str, float]:
        """Sums of gradients, prepared parameters, slots, and one layer at work."""
        mesh, job = self.layout.mesh, self.job
        in_flight = num_in_flight(mesh, self.layout.num_microbatches)
        in_flight += mesh.schedule == "gpipe"  # fitted
        stashed = in_flight * self.layout.stages(job).num_slots * self._kept_by_period
        between = NUM_SLOTS_BETWEEN_STAGES * self._bytes(job.model.model_dim / mesh.tensor)
        stack = 0.0
        if self.layout.is_scanned:
            # A loop stacks a micro-batch's gradients before they are added to the sums.
            whole = self.state.gathered * job.width
            stack = self.state.gradients if mesh.zero == 3 else whole
            if self.layout.remat == "none":
                # What each micro-batch in flight keeps has its chunk's parameters in it.
                stashed += in_flight * whole / mesh.num_chunks
        work = WORKSPACE_IN_PIPELINE * self._largest_layer + self._head
        if not self.layout.is_scanned:
            work += self._chunk_at_work
        is_by_layer = mesh.zero == 3 and self.layout.remat == "full"
        layers = 2 * self.state.largest if is_by_layer else self.state.gathered
        return {
            "gradients": self.state.gradients + stack,
            "copies": self._converted(layers) + self.state.outside * job.parameter_width,
            "stashed": COPIES_OF_SLOTS * stashed + between,
            "workspace": work,
        }

    @property
    def _chunk_at_work(self) -> float:
        """Parameters that are copied, and gradients that lie beside their sums."""
        job, num_chunks = self.job, self.layout.mesh.num_chunks
        chunk = self.state.gathered * job.width / num_chunks
        # One of several chunks is copied out of their stack. The gradients of a single period take
        # the place of its parameters.
        copied = chunk if num_chunks > 1 else 0.0
        is_in_place = copied and self.layout.stages(job).num_slots == 1
        # Kernels make the gradients of experts, which cannot add to the sums as XLA's matmuls.
        is_beside = job.model.num_experts and not is_in_place
        return copied + (EXPERT_GRADIENTS * chunk if is_beside else 0.0)

    def of_loop(self) -> dict[str, float]:
        """Sums of gradients lie there all the time, and one layer at a time is at work."""
        update = self._update if self.layout.num_microbatches == 1 else 0.0
        is_again = self.layout.remat in ("full", "names")
        of_layer = WORKSPACE_RECOMPUTED if is_again else WORKSPACE
        work = max(self._head, self._at_work(layer=of_layer, experts=WORKSPACE)) + update
        mesh, copies = self.layout.mesh, self._gathered_at_once
        if mesh.expert > 1 and mesh.zero == 3 and self.layout.remat == "none":
            # Between its two loops XLA turns the stacks of gathered matrices over.
            work = max(work, copies)
        return {
            "gradients": self._gradients(self.job.reduction_width) + self._sums_of_microbatches,
            "copies": copies,
            "stashed": self._kept_in_loop + self._prefix,
            "workspace": work,
        }

    def of_unrolled(self) -> dict[str, float]:
        """The larger of two moments: the head's backward, and the update."""
        state, job = self.state, self.job
        stashed = job.model.num_periods * self._kept_by_period + self._prefix
        copies = self._converted(state.whole)
        outside = state.outside * job.reduction_width
        sums = self._sums_of_microbatches
        work = self._head + self._experts_at_work
        # Layers' gradients stay in the compute type until they are copied into stacks.
        gradients = self._gradients(job.width)
        # Those of experts, unless ZeRO-3 cuts them, lie there before what forwards kept is freed.
        is_whole = job.model.num_experts and self.layout.mesh.zero < 3
        beside = max(outside, gradients) if is_whole else outside
        begin = stashed + beside + work
        stack = state.largest_leaf * job.width
        end = gradients + stack + WORKSPACE * self._largest_layer + self._update
        if begin >= end:
            found = {"gradients": sums + beside, "stashed": stashed, "workspace": work}
        else:
            found = {
                "gradients": sums + gradients,
                "stashed": 0.0,
                "workspace": end - gradients,
            }
        return found | {"copies": copies}

    @property
    def _sums_of_microbatches(self) -> float:
        """Gradients of the micro-batches before, which add up beside those that are being made."""
        return self.state.gradients if self.layout.num_microbatches > 1 else 0.0

    def _gradients(self, width: int) -> float:
        """All gradients of one micro-batch, in a type of so many bytes."""
        state = self.state
        elements = state.held
        if self.layout.mesh.zero == 3:
            # What is in no layer, and one layer, have whole gradients for a time.
            elements += state.outside + state.largest
        return elements * width

    @property
    def _update(self) -> float:
        """ZeRO's share of the sums, and the largest parameter as it is made whole."""
        mesh, state = self.layout.mesh, self.state
        if mesh.zero not in (1, 2) or mesh.data * mesh.sequence == 1:
            return 0.0
        share = state.gradients / (mesh.data * mesh.sequence)
        return share + state.largest_leaf * self.job.parameter_width

    @property
    def _gathered_at_once(self) -> float:
        """Parameters that a loop over layers has in another form at a time."""
        state, job = self.state, self.job
        # A loop whose backward recomputes nothing keeps each layer's parameters for it.
        kept = state.gathered if self.layout.remat == "none" else 0.0
        if self.layout.mesh.zero < 3:
            return max(kept * job.width, self._converted(state.gathered))
        return kept * job.width + state.outside * job.parameter_width

    def _converted(self, elements: float) -> float:
        """Bytes of parameters in the compute type, where they are stored in another or in parts."""
        is_other = self.job.policy.parameters != self.job.policy.compute
        return elements * self.job.width * (is_other or self.layout.mesh.zero == 3)

    @property
    def _kept_by_period(self) -> float:
        """Bytes that a period keeps of one micro-batch."""
        return self._bytes(sum(map(self._kept, self.job.period_work)))

    @property
    def _kept_in_loop(self) -> float:
        """What all periods keep; in groups, what those of one keep, and each group's input."""
        execution, num = self.job.execution, self.job.model.num_periods
        every = execution.checkpoint_every
        if every == 1:
            return num * self._kept_by_period
        inputs = self.group_inputs if execution.checkpoint_place == "device" else 0.0
        return every * self._kept_by_period + inputs

    @property
    def group_inputs(self) -> float:
        """Bytes of the inputs of groups of periods until their backward, wherever they rest."""
        num = self.job.model.num_periods / self.job.execution.checkpoint_every
        return num * self._bytes(self.job.model.model_dim / self.layout.mesh.tensor)

    @property
    def _prefix(self) -> float:
        """Bytes that the layers before the first period keep."""
        return self._bytes(sum(map(self._kept, self.job.prefix_work)))

    @property
    def _largest_layer(self) -> float:
        """Bytes that the largest layer keeps when nothing is recomputed."""
        return self._at_work(layer=1.0, experts=1.0)

    def _at_work(self, *, layer: float, experts: float) -> float:
        """The same with factors on what its experts keep and on the rest."""
        mesh, layers = self.layout.mesh, self.job.period_work
        scaled = ((each, each.all.scaled(layer, experts)) for each in layers)
        return self._bytes(max(each.kept(kept, mesh, is_at_work=True) for each, kept in scaled))

    @property
    def _experts_at_work(self) -> float:
        """Bytes of a layer's experts, whose backward begins while logits are there."""
        mesh = self.layout.mesh
        share = WORKSPACE_WITH_EXCHANGE if mesh.expert > 1 else WORKSPACE
        experts = (
            (each, each.all.scaled(layer=0.0, experts=share)) for each in self.job.period_work
        )
        return self._bytes(max(self._on_device(each, kept) for each, kept in experts))

    @property
    def _head(self) -> float:
        """Bytes of the logits of one chunk."""
        tokens = self.layout.tokens(self.job) / self.job.execution.num_loss_chunks
        return tokens * self.job.model.vocab_size / self.layout.mesh.tensor * self.job.width

    def _kept(self, work: LayerWork) -> float:
        """Elements that a layer keeps of one token on this device."""
        layout = self.layout
        is_pipelined = layout.mesh.pipeline > 1
        mesh = layout.mesh
        if layout.is_scanned:
            shares = KEPT_SCANNED_WITH_EXCHANGE if mesh.expert > 1 else KEPT_SCANNED
            kept = self._on_device(work, work.all.scaled(**shares))
        elif is_pipelined:
            kept = self._on_device(work, work.staged)
            kept += self.job.model.model_dim / mesh.tensor  # what the chunk was sent
        else:
            kept = self._on_device(work, work.all.scaled(**KEPT_UNROLLED))
        if mesh.sequence > 1:
            kept += work.heads / mesh.tensor  # attention's output before its exchange
        if mesh.tensor > 1:
            kept += self.job.model.model_dim / mesh.tensor  # what the group exchanged
        split = 0.0
        if layout.mesh.schedule == "zero_bubble":
            split = self._on_device(work, work.split)
        # What is recomputed in the backward is left for the weight gradient too.
        if layout.remat == "none" or split:
            return kept + split
        dots = work.dots_staged if is_pipelined else work.dots
        dots = work.dots_in_loop if layout.is_scanned else dots
        wanted = self._on_device(work, dots if layout.remat == "dots" else work.full)
        if layout.remat == "names" and "attention" in self.job.execution.saved_names:
            wanted += KEPT_ATTENTION * work.heads / mesh.tensor
        is_exact = layout.is_scanned or is_pipelined
        anyway = 0.0 if is_exact else KEPT_ANYWAY[layout.remat]
        return wanted + anyway * (kept - wanted)

    def _on_device(self, work: LayerWork, kept: Kept) -> float:
        return work.kept(kept, self.layout.mesh, is_at_work=False)

    def _bytes(self, elements: float) -> float:
        """Of so many elements for each token of a micro-batch."""
        return self.layout.tokens(self.job) * elements * self.job.width
