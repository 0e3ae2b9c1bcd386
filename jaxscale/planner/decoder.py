"""What the layers of a decoder do and keep for one token: FLOPs and elements, before sharding."""

import dataclasses

from jaxscale.models.config import ExpertsConfig, LayerConfig, ModelConfig
from jaxscale.parallel.mesh import MeshConfig

# Elements of what a layer keeps are read and written so often, forward and backward; from the
# profile in experiments/results/2026-11-23_h200_train_step.md: 16.7 ms of passes over memory.
FORWARD_PASSES, BACKWARD_PASSES = 1.2, 2.2


@dataclasses.dataclass(frozen=True)
class Kept:
    """Elements that a layer keeps of one token until its backward, by how they are sharded.

    Args:
        own: of the residual's width, on one member of a tensor group only.
        gathered: of the residual's width, on all members of a tensor group.
        sharded: heads and hidden vectors, of which each member has its share.
        expert: of each choice of an expert: its rows, and its share of hidden vectors.
    """

    own: float = 0.0
    gathered: float = 0.0
    sharded: float = 0.0
    expert: float = 0.0

    def on_device(self, tensor: int, expert_rows: float = 1.0) -> float:
        """Elements on one device of a tensor group, a token of the group.

        Args:
            tensor: members of the group.
            expert_rows: rows of experts that a device has room for, over its tokens' choices.
        """
        whole = self.gathered + expert_rows * self.expert
        return whole + (self.own + self.sharded) / tensor


@dataclasses.dataclass(frozen=True)
class LayerWork:
    """One layer, for one token.

    Args:
        matmul_flops: of the forward, in matmuls with weights.
        expert_flops: of the forward, in the matmuls of experts.
        attention_flops: of the forward; its backward takes 2.5 times that.
        all, dots, full: what is kept when the backward recomputes nothing, what is elementwise, or
            everything.
        staged: what a pipeline keeps when nothing is recomputed but activations, which its backward
            makes again, see `parallel.pipeline.programs`.
        heads: elements of attention's output.
        exchanged: elements of queries, keys, values and outputs, which Ulysses exchanges.
        passed: elements of keys and values, which a ring passes on.
        choices: experts a token is sent to; 0 in a dense layer.
        num_experts: E of a mixture.
    """

    matmul_flops: float
    expert_flops: float = 0.0
    attention_flops: float = 0.0
    all: Kept = Kept()
    dots: Kept = Kept()
    full: Kept = Kept()
    staged: Kept = Kept()
    heads: float = 0.0
    exchanged: float = 0.0
    passed: float = 0.0
    choices: int = 0
    num_experts: int = 0

    def rows(self, mesh: MeshConfig, *, is_stored: bool) -> float:
        """Rows of experts on a device for each token: used ones, or room for the worst case.

        Args:
            mesh: how experts are spread.
            is_stored: count the room where rows are stored, not what is sent.
        """
        if mesh.expert == 1 or (mesh.expert_exchange == "ragged" and not is_stored):
            return self.choices
        return mesh.expert * min(self.choices, self.num_experts // mesh.expert)


def layer_work(model: ModelConfig, layer: LayerConfig, length: int) -> LayerWork:
    """The work of one layer for one token of rows of `length` tokens."""
    attention, dim = layer.attention, model.model_dim
    heads = attention.num_heads * attention.head_dim
    kv_heads = attention.num_kv_heads * attention.head_dim
    window = min(attention.window or length, length)
    seen = window - window**2 / (2 * length) if model.is_causal else length
    qkvo = 2 * heads + 2 * kv_heads
    normed = heads + kv_heads if attention.qk_norm else 0
    num_norms = (1 if layer.is_parallel else 2) * layer.has_norm_before + 2 * layer.has_norm_after
    own = (2 + 2 * layer.has_norm_after) * dim
    gathered = min(num_norms, 1 if layer.is_parallel else 2) * dim
    shared = dict(
        attention_flops=4 * seen * heads,
        heads=heads,
        exchanged=qkvo,
        passed=2 * kv_heads,
    )
    attention_matmuls = 2 * dim * qkvo
    feed_forward = layer.feed_forward
    num_in = 1 + feed_forward.is_gated
    if isinstance(feed_forward, ExpertsConfig):
        active, hidden = feed_forward.num_active, feed_forward.dim
        rows = active * 2 * dim
        return LayerWork(
            matmul_flops=attention_matmuls + 2 * dim * feed_forward.num_experts,
            expert_flops=2 * active * dim * hidden * (num_in + 1),
            all=Kept(own, gathered, qkvo + normed, rows + active * hidden * (num_in + 1)),
            dots=Kept(own, 0.0, qkvo, active * hidden * num_in + active * dim),
            full=Kept(own=dim),
            staged=Kept(own, gathered, qkvo + normed, rows + active * hidden * num_in),
            choices=active,
            num_experts=feed_forward.num_experts,
            **shared,
        )
    hidden = feed_forward.dim
    return LayerWork(
        matmul_flops=attention_matmuls + 2 * dim * hidden * (num_in + 1),
        all=Kept(own, gathered, qkvo + normed + hidden * (num_in + 1)),
        dots=Kept(own, 0.0, qkvo + hidden * num_in),
        full=Kept(own=dim),
        staged=Kept(own, gathered, qkvo + normed + hidden * num_in),
        **shared,
    )
