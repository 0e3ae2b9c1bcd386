"""What the layers of a decoder do and keep for one token: FLOPs and elements, before sharding."""

import dataclasses

from jaxscale.models.config import ExpertsConfig, LayerConfig, ModelConfig

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
    """One layer, or the head, for one token.

    Args:
        matmul_flops: of the forward, in matmuls with weights.
        expert_flops: of the forward, in the matmuls of experts.
        attention_flops: of the forward; its backward takes 2.5 times that.
        all, dots, full: what is kept when the backward recomputes nothing, what is elementwise, or
            everything.
        exchanged_kv: elements of queries, keys, values and outputs that Ulysses exchanges.
        ring_kv: elements of keys and values that a ring passes on.
        choices: experts a token is sent to; 0 in a dense layer.
    """

    matmul_flops: float
    expert_flops: float = 0.0
    attention_flops: float = 0.0
    all: Kept = Kept()
    dots: Kept = Kept()
    full: Kept = Kept()
    exchanged_kv: float = 0.0
    ring_kv: float = 0.0
    choices: int = 0

    def kept(self, remat: str) -> Kept:
        """What a rematerialisation keeps; "names" is counted as "dots", of which it is a part."""
        return {"none": self.all, "full": self.full}.get(remat, self.dots)


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
        exchanged_kv=qkvo,
        ring_kv=2 * kv_heads,
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
            dots=Kept(own + dim, 0.0, qkvo, active * hidden * num_in + active * dim),
            full=Kept(own=dim),
            choices=active,
            **shared,
        )
    hidden = feed_forward.dim
    return LayerWork(
        matmul_flops=attention_matmuls + 2 * dim * hidden * (num_in + 1),
        all=Kept(own, gathered, qkvo + normed + hidden * (num_in + 1)),
        dots=Kept(own + dim, 0.0, qkvo + hidden * num_in),
        full=Kept(own=dim),
        **shared,
    )


def head_work(model: ModelConfig) -> LayerWork:
    """The unembedding and the loss for one token."""
    return LayerWork(matmul_flops=2 * model.model_dim * model.vocab_size)
