"""The configuration of attention in one kind of layer."""

import dataclasses

from jaxscale.ops.attention import BlockLayout
from jaxscale.ops.rotary import RotaryConfig
from jaxscale.types import InputError, check_choice, check_positive, check_types

PROJECTIONS = ("q", "k", "v", "o")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention of one kind of layer.

    Args:
        num_heads: N query heads.
        num_kv_heads: K key-value heads, dividing N (1: multi-query, N: multi-head).
        head_dim: H.
        rotary: rotary positions of queries and keys; None for none.
        biases: which of the projections "q", "k", "v" and "o" have a bias.
        qk_norm: RMSNorm or LayerNorm of queries and keys before their rotation: "head" over each
            head's H elements, "all" over the elements of all heads together, None for none.
        window: number of keys a query sees, its own included; None for all.
        softcap: c of c * tanh(logits / c) on attention logits; None for none.
        scale: factor on the logits; None for 1 / sqrt(H).
        layout: which blocks of the keys each head sees (block-sparse attention); None for all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotaryConfig | None = RotaryConfig()
    biases: tuple[str, ...] = ()
    qk_norm: str | None = None
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    layout: BlockLayout | None = None

    def __post_init__(self):
        check_types(self)
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            check_positive(f"AttentionConfig.{name}", getattr(self, name))
        for name in ("window", "softcap", "scale"):
            if getattr(self, name) is not None:
                check_positive(f"AttentionConfig.{name}", getattr(self, name))
        for name in self.biases:
            check_choice("AttentionConfig.biases", name, PROJECTIONS)
        check_choice("AttentionConfig.qk_norm", self.qk_norm, (None, "head", "all"))
        if self.num_heads % self.num_kv_heads:
            expected = f"num_heads % num_kv_heads == 0 ({self.num_heads} heads)"
            raise InputError("AttentionConfig.num_kv_heads", self.num_kv_heads, expected)
        if self.rotary is not None:
            self.rotary.check_head_dim(self.head_dim)
