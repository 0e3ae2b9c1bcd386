"""The configuration of a model: kinds of layers, how they repeat, and what is around them."""

import dataclasses

from jaxscale.models.config.attention import AttentionConfig
from jaxscale.models.config.experts import ExpertsConfig
from jaxscale.models.config.feed_forward import FeedForwardConfig
from jaxscale.models.config.lora import LoraConfig
from jaxscale.ops.activation import UNGATED
from jaxscale.types import (
    InputError,
    check_choice,
    check_not_negative,
    check_positive,
    check_types,
)

NORM_POSITIONS = ("before", "after", "both", "sum")


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """The norm of a model, at every place where it has one.

    Args:
        kind: "rmsnorm" or "layernorm".
        epsilon: added to the mean square, or to the variance.
        use_bias: whether a LayerNorm has a bias.
        scale_offset: added to the learned scale; 1 in Gemma, whose scales start at 0.
    """

    kind: str = "rmsnorm"
    epsilon: float = 1e-5
    use_bias: bool = False
    scale_offset: float = 0.0

    def __post_init__(self):
        check_types(self)
        check_choice("NormConfig.kind", self.kind, ("rmsnorm", "layernorm"))
        check_not_negative("NormConfig.epsilon", self.epsilon)
        if self.use_bias and self.kind == "rmsnorm":
            raise InputError("NormConfig.use_bias", True, 'False with NormConfig.kind = "rmsnorm"')


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One kind of layer: attention and a feed-forward, each added to the residual.

    Args:
        attention: its attention.
        feed_forward: a dense feed-forward or a mixture of experts.
        norm_position: "before" normalises what enters attention and feed-forward, x + f(norm(x));
            "after" normalises what leaves them, x + norm(f(x)); "both" does both; "sum" normalises
            the residual after each, norm(x + f(x)), as the first transformers do.
        is_parallel: attention and feed-forward side by side on one norm,
            x + attention(norm(x)) + feed_forward(norm(x)), instead of one after the other.
    """

    attention: AttentionConfig
    feed_forward: FeedForwardConfig | ExpertsConfig
    norm_position: str = "before"
    is_parallel: bool = False

    def __post_init__(self):
        check_types(self)
        check_choice("LayerConfig.norm_position", self.norm_position, NORM_POSITIONS)
        if self.is_parallel and self.norm_position != "before":
            expected = "False unless LayerConfig.norm_position is 'before'"
            raise InputError("LayerConfig.is_parallel", True, expected)

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward is a mixture of experts."""
        return isinstance(self.feed_forward, ExpertsConfig)

    @property
    def has_norm_before(self) -> bool:
        """Whether what enters attention and feed-forward is normalised."""
        return self.norm_position in ("before", "both")

    @property
    def has_norm_after(self) -> bool:
        """Whether what leaves attention and feed-forward is normalised."""
        return self.norm_position in ("after", "both")

    @property
    def has_norm_of_sum(self) -> bool:
        """Whether the residual is normalised after each has been added to it."""
        return self.norm_position == "sum"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A transformer, dense or mixture-of-experts, causal or bidirectional.

    Args:
        vocab_size: V, rows of the embedding.
        num_layers: L, prefix included.
        model_dim: D.
        max_length: longest sequence the model is made for (rows of a learned position table).
        pattern: the kinds of layers that repeat, one for each position of a period.
        prefix: layers that stand before the first period.
        norm: the norm of all layers and of the end.
        is_causal: whether a token sees no later token.
        use_learned_positions: whether a learned vector a position is added to the embeddings.
        num_token_types: learned vectors of token types, of which a batch's `types` say which is
            added to each embedding, the first where it has none; 0 for no types.
        use_embedding_norm: whether the sum of the embeddings is normalised.
        embedding_scale: factor on the embeddings of tokens; sqrt(D) in Gemma.
        unembedding_scale: factor on what the unembedding takes, 1 / width in muP
            (arXiv 2203.03466, table 8).
        head_activation: of a dense layer with a bias before the final norm, as in BERT; None for no
            such layer.
        use_pooler: whether a dense layer with tanh makes a vector of a whole text out of its first
            token, as in BERT; see `models.pooling`.
        use_pair_head: whether that vector has two logits, of which the first is larger where the
            text's second sentence follows the first; needs use_pooler.
        use_value_head: whether a matrix to one value a token takes the place of the unembedding, as
            in a reward model; see `models.values`.
        is_tied: whether the unembedding is the embedding.
        use_head_bias: whether the logits have a bias; -inf forbids a word, see `ops.loss.Head`.
        logit_softcap: c of c * tanh(logits / c) on the final logits; None for none.
        lora: low-rank adapters beside the matrices; None for none.
        init_std: standard deviation of initial weights; output projections divide it by sqrt(2 L).
        width_multiplier: m of muP (arXiv 2203.03466, table 8), D over that of the narrow model
            whose learning rate is taken over: matrices and routers begin with init_std / sqrt(m)
            and learn at 1 / m of AdamW's rate. It goes with an unembedding_scale of 1 / m and heads
            of one size at all widths.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    max_length: int
    pattern: tuple[LayerConfig, ...]
    prefix: tuple[LayerConfig, ...] = ()
    norm: NormConfig = NormConfig()
    is_causal: bool = True
    use_learned_positions: bool = False
    num_token_types: int = 0
    use_embedding_norm: bool = False
    embedding_scale: float = 1.0
    unembedding_scale: float = 1.0
    head_activation: str | None = None
    use_pooler: bool = False
    use_pair_head: bool = False
    use_value_head: bool = False
    is_tied: bool = False
    use_head_bias: bool = False
    logit_softcap: float | None = None
    lora: LoraConfig | None = None
    init_std: float = 0.02
    width_multiplier: float = 1.0

    def __post_init__(self):
        check_types(self)
        for name in ("vocab_size", "num_layers", "model_dim", "max_length"):
            check_positive(f"ModelConfig.{name}", getattr(self, name))
        check_not_negative("ModelConfig.init_std", self.init_std)
        check_not_negative("ModelConfig.num_token_types", self.num_token_types)
        check_positive("ModelConfig.embedding_scale", self.embedding_scale)
        check_positive("ModelConfig.unembedding_scale", self.unembedding_scale)
        check_positive("ModelConfig.width_multiplier", self.width_multiplier)
        if self.head_activation is not None:
            check_choice("ModelConfig.head_activation", self.head_activation, tuple(UNGATED))
        if self.use_pair_head and not self.use_pooler:
            expected = "False without ModelConfig.use_pooler, whose vector the head takes"
            raise InputError("ModelConfig.use_pair_head", True, expected)
        if self.logit_softcap is not None:
            check_positive("ModelConfig.logit_softcap", self.logit_softcap)
        self._check_layers()

    def _check_layers(self) -> None:
        if not self.pattern:
            raise InputError("ModelConfig.pattern", self.pattern, "at least one layer")
        if len(self.prefix) >= self.num_layers:
            expected = f"at most {self.num_layers - 1} layers, fewer than num_layers"
            raise InputError("ModelConfig.prefix", f"{len(self.prefix)} layers", expected)
        if (self.num_layers - len(self.prefix)) % self.period:
            expected = (
                f"(num_layers - len(prefix)) % len(pattern) == 0 with {len(self.prefix)} layers in "
                f"prefix and {self.period} in pattern"
            )
            raise InputError("ModelConfig.num_layers", self.num_layers, expected)
        for layer in (*self.prefix, *self.pattern):
            attention = layer.attention
            if not self.is_causal and (attention.window or attention.layout):
                expected = "True where a layer has a window or a layout of blocks"
                raise InputError("ModelConfig.is_causal", False, expected)
        if any(layer.is_moe for layer in self.prefix):
            expected = "dense layers: the load of a mixture is reported for the repeating layers"
            raise InputError("ModelConfig.prefix", "a mixture of experts", expected)
        numbers = {layer.feed_forward.num_experts for layer in self.pattern if layer.is_moe}
        if len(numbers) > 1:
            expected = "one ExpertsConfig.num_experts for all mixtures of a model"
            raise InputError("ModelConfig.pattern", sorted(numbers), expected)

    @property
    def period(self) -> int:
        """Layers in the repeating pattern."""
        return len(self.pattern)

    @property
    def num_periods(self) -> int:
        """How often the pattern repeats: the leading dim of each stack."""
        return (self.num_layers - len(self.prefix)) // self.period

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """Every layer in order."""
        return self.prefix + self.pattern * self.num_periods

    @property
    def switch_lengths(self) -> tuple[int, ...]:
        """Lengths of a document beyond which some layer's rotary positions are others."""
        rotaries = [layer.attention.rotary for layer in self.layers]
        lengths = {rotary.switch_length for rotary in rotaries if rotary is not None}
        return tuple(sorted(lengths - {None}))

    @property
    def num_experts(self) -> int:
        """E of the model's mixtures; 0 for a dense model."""
        numbers = [layer.feed_forward.num_experts for layer in self.pattern if layer.is_moe]
        return numbers[0] if numbers else 0


def training_flops_per_token(
    config: ModelConfig,
    num_active: int,
    length: int,
) -> float:
    """FLOPs of forward and backward per token: 6 N_active plus causal attention counted at half.

    A window of w tokens is counted as what a query sees on average, w - w^2 / 2T: half of T where
    w = T. Without a causal mask a query sees all T keys.

    Args:
        config: the model.
        num_active: parameters that one token multiplies with. The embedding look-up is no matmul
            and is left out; the unembedding counts.
        length: T, tokens a row.
    Returns:
        FLOPs per token; recompute is not counted.
    """
    flops = 6.0 * num_active
    for layer in config.layers:
        attention = layer.attention
        window = min(attention.window or length, length)
        seen = window - window**2 / (2 * length) if config.is_causal else length
        flops += 12 * seen * attention.num_heads * attention.head_dim
    return flops
