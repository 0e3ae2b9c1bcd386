"""The modelled time of one micro-batch through one layer: FLOPs, bytes and exchanges."""

import dataclasses

import numpy as np

from jaxscale.parallel.mesh import EXPERT, SEQUENCE, TENSOR, MeshConfig
from jaxscale.planner.cluster import Cluster, group_of
from jaxscale.planner.decoder import BACKWARD_PASSES, FORWARD_PASSES, LayerWork
from jaxscale.planner.job import Job
from jaxscale.planner.pipeline import BACKWARD, FORWARD

PARTS = ("matmul", "attention", "memory", "recompute", "tensor", "sequence", "expert", "zero")
MATMUL, ATTENTION, MEMORY, RECOMPUTE, IN_TENSOR, IN_SEQUENCE, IN_EXPERT, IN_ZERO = range(8)
COMPUTED = slice(MATMUL, RECOMPUTE + 1)  # what a device does by itself

# Shares of exchanges that have nothing to compute beside them, from
# experiments/results/2026-11-27_two_h200_scaling.md.
EXPOSED_TENSOR, EXPOSED_TENSOR_IN_PIPELINE = 0.8, 1.0
ATTENTION_BACKWARD = 2.5  # times the FLOPs of its forward (arXiv 2205.14135, section 4)
HALF_RATE_LENGTH = 1130  # tokens of rows at which attention has half its rate; same pages
SHORTEST_MATMUL = 512  # tokens; matmuls of fewer rows take as long
# Passes of a ring over attention's output, to merge what its rounds bring, beside one device's;
# from the ring's and Ulysses' times in 2026-11-27_two_h200_long_sequences.md.
RING_FORWARD_PASSES, RING_BACKWARD_PASSES = 40.0, 75.0


@dataclasses.dataclass(frozen=True)
class LayerClock:
    """Times layers of one job on one cluster."""

    job: Job
    cluster: Cluster

    @property
    def matmul_flops(self) -> float:
        """FLOP/s of matmuls with weights."""
        device = self.cluster.device
        if self.job.policy.compute == "float32":
            return device.float32_flops
        return device.matmul_flops * device.matmul_share

    @property
    def memory_bandwidth(self) -> float:
        """Bytes/s of passes over memory."""
        device = self.cluster.device
        return device.memory_bandwidth * device.memory_share

    @property
    def _attention_flops(self) -> float:
        """FLOP/s of attention, which is slow where rows are short."""
        length = self.job.length
        device = self.cluster.device
        rate = device.matmul_flops * device.attention_share
        return rate * length / (length + HALF_RATE_LENGTH)

    def layer(
        self,
        work: LayerWork,
        tokens: float,
        remat: str,
        mesh: MeshConfig,
    ) -> np.ndarray:
        """Seconds [3, parts] of forward, backward of the input, and weight gradient.

        Args:
            work: of the layer.
            tokens: of a micro-batch that a tensor group works on.
            remat: what the backward recomputes.
            mesh: how the layer is spread.
        """
        device, share = self.cluster.device, 1 / mesh.tensor
        matmul = max(tokens, SHORTEST_MATMUL) * work.matmul_flops * share / self.matmul_flops
        experts = tokens * work.expert_flops * share
        experts /= device.matmul_flops * device.expert_share
        matmul += experts
        attention = tokens * work.attention_flops * share / self._attention_flops
        attention /= work.attention_rate
        kept = tokens * work.all.on_device(mesh, 1.0) * self.job.width
        memory = kept / self.memory_bandwidth
        output = tokens * work.heads * share * self.job.width / self.memory_bandwidth
        ring = output if mesh.ring > 1 else 0.0
        seconds = np.zeros((3, len(PARTS)))
        seconds[:, MATMUL] = matmul
        seconds[:2, ATTENTION] = attention, attention * ATTENTION_BACKWARD
        reread = tokens * work.reread * share * self.job.width / self.memory_bandwidth
        seconds[:2, MEMORY] = memory * FORWARD_PASSES, memory * BACKWARD_PASSES + reread
        exchanges = self._exchanges(work, tokens, mesh, attention)
        seconds[:2] += exchanges
        seconds[FORWARD, IN_SEQUENCE] += ring * RING_FORWARD_PASSES
        seconds[BACKWARD, IN_SEQUENCE] += ring * RING_BACKWARD_PASSES
        if remat == "dots":
            # Kernels of experts are no products to the policy.
            seconds[BACKWARD, RECOMPUTE] = seconds[FORWARD, MEMORY] + experts
        elif remat != "none":
            kept = ATTENTION if self.job.is_attention_kept(remat) else []
            seconds[BACKWARD, RECOMPUTE] = np.delete(seconds[FORWARD], kept).sum()
        elif mesh.pipeline > 1:
            # Activations are made again; see `decoder.LayerWork.staged`.
            left = work.all.on_device(mesh, 1.0) - work.staged.on_device(mesh, 1.0)
            remade = tokens * left * self.job.width / self.memory_bandwidth
            seconds[BACKWARD, RECOMPUTE] = remade * FORWARD_PASSES
        return seconds

    def head(self, tokens: float, tensor: int) -> float:
        """Seconds of the unembedding with the loss, whose gradient is made in the forward."""
        matmuls = 3 * tokens * self.job.head_flops / self.matmul_flops
        sums = 0.0
        if (num_chunks := self.job.execution.num_loss_chunks) > 1:
            # Each chunk's gradient is added to float32 sums, which are read and written.
            model = self.job.model
            sums = num_chunks * 2 * 4 * model.vocab_size * model.model_dim / self.memory_bandwidth
        return (matmuls + sums) / tensor

    def _exchanges(
        self,
        work: LayerWork,
        tokens: float,
        mesh: MeshConfig,
        attention: float,
    ) -> np.ndarray:
        """Seconds [parts] that a forward waits for other devices; a backward waits as long."""
        width, dim = self.job.width, self.job.model.model_dim
        seconds = np.zeros(len(PARTS))
        if mesh.tensor > 1:
            exposed = EXPOSED_TENSOR if mesh.pipeline == 1 else EXPOSED_TENSOR_IN_PIPELINE
            group = group_of(self.cluster, mesh, (TENSOR,))
            # A gather before and a reduce-scatter after attention and feed-forward.
            seconds[IN_TENSOR] = 4 * exposed * group.all_gather_s(tokens * dim * width)
        if mesh.sequence > 1:
            group = group_of(self.cluster, mesh, (SEQUENCE,))
            if members := mesh.sequence // mesh.ring - 1:
                heads = tokens * work.exchanged / mesh.tensor * width
                ulysses = dataclasses.replace(group, size=members + 1)
                # q, k and v leave together, o on its own.
                seconds[IN_SEQUENCE] = 2 * ulysses.all_to_all_s(heads / 2)
            passed = tokens * work.passed / mesh.tensor * width * (mesh.ring - 1)
            ring = group.permute_s(passed) if mesh.ring > 1 else 0.0
            seconds[IN_SEQUENCE] += max(0.0, ring - attention)
        if work.choices and mesh.expert > 1:
            group = group_of(self.cluster, mesh, (EXPERT,))
            # All tokens there, and a sum for each of them back.
            seconds[IN_EXPERT] = 2 * group.all_gather_s(tokens * mesh.expert * dim * width)
        return seconds
