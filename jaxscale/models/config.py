"""The configuration of a decoder and what follows from it: layer patterns, parameter and FLOP counts."""

import dataclasses
import math
from typing import Any

from jaxscale.ops.activation import ACTIVATIONS
from jaxscale.types import InputError, check_choice, check_not_negative, check_positive, check_types

ROUTERS = (
    "gshard",
    "sparsemixer",
    "sparsemixer_v2",
    "sparsemixer_v2_star",
    "masked_sampling",
    "densemixer",
)
ALIKE = {
    "masked_sampling": "gshard",
    "densemixer": "gshard",
}  # without draws they compute what "gshard" does


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What distinguishes one layer from its neighbours: its attention window (None: all) and whether it is MoE."""

    window: int | None
    is_moe: bool


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, dense or mixture-of-experts.

    Layers repeat a pattern whose period is the least common multiple of the lengths of `windows`
    and `moe_pattern`; the first `num_dense_prefix` layers stand before it and are dense whatever
    the pattern says.

    Args:
        vocab_size: V, rows of the embedding.
        num_layers: L, prefix included.
        model_dim: D.
        num_heads: N query heads.
        num_kv_heads: K key-value heads, dividing N (1: multi-query, N: multi-head).
        head_dim: H.
        ffn_dim: F of the dense layers.
        max_length: longest sequence the model is made for (rows of a learned position table).
        norm: "rmsnorm" or "layernorm".
        norm_epsilon: added to the (mean) square.
        use_bias: biases in projections, dense feed-forwards and LayerNorms; experts and routers
            have none.
        activation: "swiglu", "geglu" or "gelu".
        positions: "rope", "learned" or "none".
        rope_theta: base of the rotary frequencies.
        windows: attention window of each layer of the pattern, in tokens; None is full attention.
        is_tied: whether the unembedding is the embedding.
        use_head_bias: whether the logits have a bias.
        use_qk_norm: normalise queries and keys over the head dim.
        logit_softcap: c of c * tanh(logits / c) on the final logits; None for none.
        attention_softcap: the same on attention logits.
        moe_pattern: whether each layer of the pattern is mixture-of-experts.
        num_dense_prefix: leading layers outside the pattern.
        num_experts: E; 0 for a dense model.
        num_active_experts: A experts per token.
        expert_dim: F of one expert.
        router: one of ROUTERS: "gshard", top-k of the softmax (arXiv 2006.16668); "sparsemixer"
            (arXiv 2310.00811), "sparsemixer_v2" and "sparsemixer_v2_star" (arXiv 2409.12136), drawn
            experts whose router is differentiated through the draw; "masked_sampling", drawn like
            v2's, gates as "gshard"; "densemixer", "gshard" whose router learns from all experts.
            What is drawn is drawn in training only.
        router_threshold: r of equation 2 of arXiv 2409.12136, by which an expert's logit may fall
            short of the largest.
        router_mask: "paper", that equation, or "released", the form of its code and of Hugging
            Face's PhiMoE.
        router_expert_gradient: "paper" or "released", see `models.sparsemixer.sparsemixer`.
        balance_loss: weight of the load-balance loss (arXiv 2101.03961, equation 4), whose shares
            are of one layer and a micro-batch's tokens on all devices.
        router_z_loss: weight of the router's z-loss (arXiv 2202.08906, equation 5).
        expert_dropout: probability with which an element of an expert's hidden vector is dropped in
            training (arXiv 2101.03961, section 4).
        init_std: standard deviation of initial weights; output projections divide it by sqrt(2 L).
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_length: int
    norm: str = "rmsnorm"
    norm_epsilon: float = 1e-5
    use_bias: bool = False
    activation: str = "swiglu"
    positions: str = "rope"
    rope_theta: float = 10000.0
    windows: tuple[int | None, ...] = (None,)
    is_tied: bool = False
    use_head_bias: bool = False
    use_qk_norm: bool = False
    logit_softcap: float | None = None
    attention_softcap: float | None = None
    moe_pattern: tuple[bool, ...] = (False,)
    num_dense_prefix: int = 0
    num_experts: int = 0
    num_active_experts: int = 2
    expert_dim: int = 0
    router: str = "gshard"
    router_threshold: float = 0.01
    router_mask: str = "paper"
    router_expert_gradient: str = "paper"
    balance_loss: float = 0.01
    router_z_loss: float = 0.0
    expert_dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self):
        check_types(self)
        for name in (
            "vocab_size",
            "num_layers",
            "model_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_length",
        ):
            check_positive(f"ModelConfig.{name}", getattr(self, name))
        check_choice("ModelConfig.norm", self.norm, ("rmsnorm", "layernorm"))
        check_choice("ModelConfig.activation", self.activation, ACTIVATIONS)
        check_choice("ModelConfig.positions", self.positions, ("rope", "learned", "none"))
        check_choice("ModelConfig.router", self.router, ROUTERS)
        for name in ("router_mask", "router_expert_gradient"):
            check_choice(f"ModelConfig.{name}", getattr(self, name), ("paper", "released"))
        for name in (
            "norm_epsilon",
            "init_std",
            "balance_loss",
            "router_z_loss",
            "router_threshold",
        ):
            check_not_negative(f"ModelConfig.{name}", getattr(self, name))
        self._check_attention()
        self._check_layers()
        self._check_experts()

    def _check_attention(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                "ModelConfig.num_kv_heads",
                self.num_kv_heads,
                f"num_heads % num_kv_heads == 0 ({self.num_heads} heads)",
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise InputError(
                "ModelConfig.head_dim", self.head_dim, "an even number for rotary positions"
            )
        check_positive("ModelConfig.rope_theta", self.rope_theta)
        optional = [("windows", window) for window in self.windows]
        optional += [(name, getattr(self, name)) for name in ("logit_softcap", "attention_softcap")]
        for name, value in optional:
            if value is not None:
                check_positive(f"ModelConfig.{name}", value)

    def _check_layers(self) -> None:
        if not self.windows or not self.moe_pattern:
            raise InputError(
                "ModelConfig.windows",
                self.windows,
                "at least one layer in windows and in moe_pattern",
            )
        if not 0 <= self.num_dense_prefix < self.num_layers:
            raise InputError(
                "ModelConfig.num_dense_prefix", self.num_dense_prefix, f"0 to {self.num_layers - 1}"
            )
        if (self.num_layers - self.num_dense_prefix) % self.period:
            raise InputError(
                "ModelConfig.num_layers",
                self.num_layers,
                f"(num_layers - num_dense_prefix) % period == 0 with num_dense_prefix {self.num_dense_prefix} and "
                f"period lcm(len(windows), len(moe_pattern)) = {self.period}",
            )

    def _check_experts(self) -> None:
        if not 0 <= self.expert_dropout < 1:
            raise InputError(
                "ModelConfig.expert_dropout", self.expert_dropout, "0 or a probability below 1"
            )
        if self.num_dense_prefix or not all(self.moe_pattern):
            check_positive("ModelConfig.ffn_dim", self.ffn_dim)
        if not any(self.moe_pattern):
            return
        check_positive("ModelConfig.num_experts", self.num_experts)
        check_positive("ModelConfig.expert_dim", self.expert_dim)
        if not 1 <= self.num_active_experts <= self.num_experts:
            raise InputError(
                "ModelConfig.num_active_experts",
                self.num_active_experts,
                f"1 to num_experts = {self.num_experts}",
            )
        if self.router == "sparsemixer" and self.num_active_experts > 1:
            expected = (
                '1 with ModelConfig.router = "sparsemixer", which is defined for one expert a token'
            )
            raise InputError("ModelConfig.num_active_experts", self.num_active_experts, expected)

    @property
    def period(self) -> int:
        """Layers in the repeating pattern."""
        return math.lcm(len(self.windows), len(self.moe_pattern))

    @property
    def pattern(self) -> tuple[LayerKind, ...]:
        """The layers of one period."""
        return tuple(
            LayerKind(
                self.windows[i % len(self.windows)], self.moe_pattern[i % len(self.moe_pattern)]
            )
            for i in range(self.period)
        )

    @property
    def prefix(self) -> tuple[LayerKind, ...]:
        """The dense layers before the pattern."""
        return tuple(
            LayerKind(self.windows[i % len(self.windows)], False)
            for i in range(self.num_dense_prefix)
        )

    @property
    def num_periods(self) -> int:
        """How often the pattern repeats: the leading dim of each stack."""
        return (self.num_layers - self.num_dense_prefix) // self.period

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """Every layer in order."""
        return self.prefix + self.pattern * self.num_periods

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward has a gate matrix."""
        return self.activation in ("swiglu", "geglu")


def checkpoint_facts(config: ModelConfig) -> dict[str, Any]:
    """What `Checkpoints` must know of a model: the fields that shape its parameters or say what they compute.

    Returns:
        `fingerprint`, these fields, and `defaults`, their values in checkpoints that are older than
        a field.
    """
    left_out = {
        "init_std",
        "balance_loss",
        "router_z_loss",
        "router_expert_gradient",
        "expert_dropout",
    }
    if config.positions != "learned":
        left_out.add("max_length")  # no parameter has it
    if (router := ALIKE.get(config.router, config.router)) == "gshard":
        left_out |= {"router_threshold", "router_mask"}
    fields = [field for field in dataclasses.fields(config) if field.name not in left_out]
    return {
        "fingerprint": {field.name: getattr(config, field.name) for field in fields}
        | {"router": router},
        "defaults": {
            field.name: field.default
            for field in fields
            if field.default is not dataclasses.MISSING
        },
    }


def training_flops_per_token(config: ModelConfig, num_active_parameters: int, length: int) -> float:
    """FLOPs of forward and backward per token: 6 N_active plus causal attention counted at half.

    A window of w tokens is counted as what a query sees on average, w - w^2 / 2T: half of T where w
    = T.

    Args:
        config: the model.
        num_active_parameters: parameters that one token multiplies with; the embedding look-up is
            no matmul and is left out, the unembedding is in.
        length: T, tokens a row.
    Returns:
        FLOPs per token; recompute is not counted.
    """
    windows = [min(kind.window or length, length) for kind in config.layers]
    attended = sum(window - window**2 / (2 * length) for window in windows)
    return 6 * num_active_parameters + 12 * attended * config.num_heads * config.head_dim
