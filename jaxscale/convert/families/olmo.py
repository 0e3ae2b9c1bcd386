"""OLMo 2 and OLMoE: a norm of the queries and keys of all heads together.

OLMo 2 normalises what leaves attention and feed-forward, OLMoE what enters them.
Source: OLMo Team 2024 (arXiv 2501.00656); Muennighoff et al. 2024 (arXiv 2409.02060).
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.families import llama
from jaxscale.convert.families.qwen3 import EXPERTS, read_normed_attention, read_num_experts
from jaxscale.convert.family import GATED, Family, check_gates, read_around
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.models.config import ExpertsConfig, LayerConfig, ModelConfig, TopKRouter

OLMO2_NAMES = llama.NAMES | {
    "attention/norm_after": "post_attention_layernorm",
    "ffn/norm_after": "post_feedforward_layernorm",
}


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of an OLMo 2's config.json."""
    around = read_around(fields, names)
    attention = read_normed_attention(fields, around, "all")
    layer = LayerConfig(attention, llama.read_feed_forward(fields), norm_position="after")
    return llama.of_layers([layer], fields, around)


def read_moe(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of an OLMoE's config.json."""
    around = read_around(fields, names)
    attention = read_normed_attention(fields, around, "all")
    fields.expect("clip_qkv")
    experts = ExpertsConfig(
        num_experts=read_num_experts(fields),
        num_active=fields.take("num_experts_per_tok", int),
        dim=fields.take("intermediate_size", int),
        activation=fields.choose("hidden_act", GATED),
        router=TopKRouter(fields.take("norm_topk_prob", bool)),
    )
    layer = LayerConfig(attention, check_gates(fields, experts))
    return llama.of_layers([layer], fields, around)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of an OLMo 2."""
    has_biases = bool(config.layers[0].attention.biases)
    return llama.write_dense(config) | {"attention_bias": has_biases}


def write_moe(config: ModelConfig) -> dict[str, Any]:
    """The fields of an OLMoE."""
    experts = config.layers[0].feed_forward
    return write(config) | {
        "num_experts": config.num_experts,
        "num_experts_per_tok": getattr(experts, "num_active", 0),
        "norm_topk_prob": getattr(getattr(experts, "router", None), "is_renormalised", None),
    }


OLMO2 = Family(("olmo2",), "Olmo2ForCausalLM", read, write, Layout(OLMO2_NAMES))
OLMOE_LAYOUT = Layout(llama.NAMES | EXPERTS)
OLMOE = Family(("olmoe",), "OlmoeForCausalLM", read_moe, write_moe, OLMOE_LAYOUT, has_score=False)
