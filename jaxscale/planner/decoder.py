"""What the layers of a decoder do and keep for one token: FLOPs and elements, before sharding."""

import dataclasses

from jaxscale.models.config import ExpertsConfig, LayerConfig, ModelConfig
from jaxscale.parallel.mesh import TENSOR, MeshConfig

# Elements of what a layer keeps are read and written so often, forward and backward; from the
# profile in experiments/results/2026-11-23_h200_train_step.md: 16.7 ms of passes over memory.
FORWARD_PASSES, BACKWARD_PASSES = 1.2, 2.2
# Of what experts keep, with the buffers of an exchange; fitted to compiled steps as in `memory`.
ROOM_OF_EXCHANGE = 1.45
# Attention that is not causal, has a window or other heads goes to cuDNN; from
# experiments/results/2026-11-24_h200_attention.md, forward with backward.
CUDNN_RATE = 0.85
# The moments of a layer norm's input, in two passes, and its weights' gradients in one over two
# arrays; a step compiled for an H200 has them, where RMSNorm has a kernel.
LAYER_NORM_REREAD = 4
# Of what experts give back, what a loop keeps where the outputs of matmuls are kept; fitted too.
DOTS_RETURNED = 0.75


@dataclasses.dataclass(frozen=True)
class Kept:
    """Elements that a layer keeps of one token until its backward, by how they are sharded.

    Args:
        own: of the residual's width, on one member of a tensor group only.
        gathered: of the residual's width, on all members of a tensor group.
        sharded: heads and hidden vectors, of which each member has its share.
        rows: of the residual's width, what experts are given, of all choices.
        hidden: hidden vectors of all choices of experts.
        returned: of the residual's width, what experts give back, of all choices.
    """

    own: float = 0.0
    gathered: float = 0.0
    sharded: float = 0.0
    rows: float = 0.0
    hidden: float = 0.0
    returned: float = 0.0

    def scaled(self, layer: float, experts: float) -> "Kept":
        """With a factor on what experts keep and one on the rest."""
        return Kept(
            own=self.own * layer,
            gathered=self.gathered * layer,
            sharded=self.sharded * layer,
            rows=self.rows * experts,
            hidden=self.hidden * experts,
            returned=self.returned * experts,
        )

    def on_device(self, mesh: MeshConfig, room: float) -> float:
        """Elements on one device, a token of its tensor group.

        Args:
            mesh: how the layer is spread.
            room: rows of experts that a device has room for, over its tokens' choices.
        """
        hidden = self.hidden if mesh.expert_axis == TENSOR else self.hidden / mesh.tensor
        shares = (self.own + self.sharded) / mesh.tensor
        experts = room * (self.rows + hidden + self.returned)
        return self.gathered + shares + experts


@dataclasses.dataclass(frozen=True)
class LayerWork:
    """One layer, for one token.

    Args:
        matmul_flops: of the forward, in matmuls with weights.
        expert_flops: of the forward, in the matmuls of experts.
        attention_flops: of the forward; its backward takes 2.5 times that.
        attention_rate: over that of the kernel for a causal mask and heads of 128.
        all, dots, full: what is kept when the backward recomputes nothing, what is elementwise, or
            everything.
        dots_in_loop, dots_staged: the second of these in a loop over layers, and in a pipeline.
        staged: what a pipeline keeps when nothing is recomputed but activations, which its backward
            makes again, see `parallel.pipeline.programs`.
        split: what the backward leaves for a weight gradient that comes later: the gradients of
            what matmuls with weights make, and of what biases and norms are for.
        heads: elements of attention's output.
        exchanged: elements of queries, keys, values and outputs, which Ulysses exchanges.
        passed: elements of keys and values, which a ring passes on.
        choices: experts a token is sent to; 0 in a dense layer.
        num_experts: E of a mixture.
        reread: elements that the backward of norms without a kernel reads in passes of its own.
    """

    matmul_flops: float
    expert_flops: float = 0.0
    attention_flops: float = 0.0
    attention_rate: float = 1.0
    all: Kept = Kept()
    dots: Kept = Kept()
    full: Kept = Kept()
    dots_in_loop: Kept = Kept()
    dots_staged: Kept = Kept()
    staged: Kept = Kept()
    split: Kept = Kept()
    heads: float = 0.0
    exchanged: float = 0.0
    passed: float = 0.0
    choices: int = 0
    num_experts: int = 0
    reread: float = 0.0

    def most_rows(self, mesh: MeshConfig) -> int:
        """Rows of experts that a device may get for each of its tokens."""
        return mesh.expert * min(self.choices, self.num_experts // mesh.expert)

    def kept(
        self,
        kept: Kept,
        mesh: MeshConfig,
        *,
        is_at_work: bool,
    ) -> float:
        """Elements on one device of what is kept of a token, with room for the worst case.

        Args:
            kept: one of the layer's.
            mesh: how the layer is spread.
            is_at_work: count the buffers of an exchange, too.
        """
        room = 1.0
        if self.choices and mesh.expert > 1:
            room = self.most_rows(mesh) / self.choices
            room *= ROOM_OF_EXCHANGE if is_at_work else 1.0
        return kept.on_device(mesh, room)


def layer_work(model: ModelConfig, layer: LayerConfig, length: int) -> LayerWork:
    """The work of one layer for one token of rows of `length` tokens."""
    attention, dim = layer.attention, model.model_dim
    heads = attention.num_heads * attention.head_dim
    kv_heads = attention.num_kv_heads * attention.head_dim
    window = min(attention.window or length, length)
    seen = window - window**2 / (2 * length) if model.is_causal else length
    qkvo = 2 * heads + 2 * kv_heads
    normed = heads + kv_heads if attention.qk_norm else 0
    num_after = 2 * (layer.has_norm_after or layer.has_norm_of_sum)
    num_norms = (1 if layer.is_parallel else 2) * layer.has_norm_before + num_after
    num_layer_norms = num_norms * (model.norm.kind == "layernorm")
    own = (2 + num_after) * dim
    gathered = min(num_norms, 1 if layer.is_parallel else 2) * dim
    has_kernel = model.is_causal and attention.window is None and attention.head_dim == 128
    shared = dict(
        attention_flops=4 * seen * heads,
        attention_rate=1.0 if has_kernel else CUDNN_RATE,
        heads=heads,
        exchanged=qkvo,
        passed=2 * kv_heads,
        reread=LAYER_NORM_REREAD * num_layer_norms * dim,
    )
    attention_matmuls = 2 * dim * qkvo
    feed_forward = layer.feed_forward
    num_in = 1 + feed_forward.is_gated
    split_own = (2 + num_layer_norms) * dim
    # A layer norm's backward makes its deviations again, of what the next layer keeps anyway.
    staged_own = 2 * dim if num_layer_norms else own
    # Queries, keys and values are one array for the weights, and three for the biases.
    has_biases = not {"q", "k", "v"}.isdisjoint(attention.biases)
    split_qkv = (qkvo - heads) * (1 + has_biases)
    if isinstance(feed_forward, ExpertsConfig):
        active, hidden = feed_forward.num_active, feed_forward.dim
        rows, hidden = active * dim, active * hidden
        return LayerWork(
            matmul_flops=attention_matmuls + 2 * dim * feed_forward.num_experts,
            expert_flops=2 * dim * hidden * (num_in + 1),
            all=Kept(own, gathered, qkvo + normed, rows, hidden * (num_in + 1), rows),
            dots=Kept(own, 0.0, qkvo, rows, hidden * num_in),
            # Matmuls of experts are no products to the policy, and a loop recomputes them.
            dots_in_loop=Kept(own, 0.0, qkvo, returned=DOTS_RETURNED * rows),
            dots_staged=Kept(own, 0.0, qkvo),
            full=Kept(own=dim),
            staged=Kept(staged_own, gathered, qkvo + normed, rows, hidden * num_in, rows),
            # One of the hidden vectors is in float32.
            split=Kept(split_own, 0.0, split_qkv, rows, hidden * (num_in + 2)),
            choices=active,
            num_experts=feed_forward.num_experts,
            **shared,
        )
    hidden = feed_forward.dim
    return LayerWork(
        matmul_flops=attention_matmuls + 2 * dim * hidden * (num_in + 1),
        all=Kept(own, gathered, qkvo + normed + hidden * (num_in + 1)),
        dots=Kept(own, 0.0, qkvo + hidden * num_in),
        dots_in_loop=Kept(own, 0.0, qkvo + hidden * num_in),
        dots_staged=Kept(own, 0.0, qkvo + hidden * num_in),
        full=Kept(own=dim),
        # What enters an activation and what leaves it, or the two that a gate multiplies.
        staged=Kept(staged_own, gathered, qkvo + normed + hidden * 2),
        split=Kept(split_own, 0.0, split_qkv + hidden * num_in),
        **shared,
    )
