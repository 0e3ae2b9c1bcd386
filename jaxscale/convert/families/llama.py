"""Llama 2, 3 and 3.1, and what is released in its form: the LLM-jp models from v2 on.

Stated defaults: files of Llama 2 lack `rope_theta`, which is 10,000 there, and files before
transformers 4.40 lack `attention_bias` and `mlp_bias`, of which there are none.
Source: Touvron et al. 2023 (arXiv 2307.09288); Grattafiori et al. 2024 (arXiv 2407.21783).
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxscale.convert.family import (
    EVERY_BIAS,
    GATED,
    NAMES_OF_GATED,
    Family,
    pattern_of,
    read_around,
    read_attention,
    write_around,
    write_attention,
)
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.convert.rotary import read_rotary
from jaxscale.models.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
)

THETA = 10000.0
AROUND_LAYERS = {
    "embedding/tokens": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
}
ATTENTION = {
    "attention/norm": "input_layernorm",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "attention/o": "self_attn.o_proj",
}
FEED_FORWARD = {
    "ffn/norm": "post_attention_layernorm",
    "ffn/gate": "mlp.gate_proj",
    "ffn/up": "mlp.up_proj",
    "ffn/down": "mlp.down_proj",
}
NAMES = AROUND_LAYERS | ATTENTION | FEED_FORWARD


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    around = read_around(fields, names)
    has_biases = fields.take("attention_bias", bool, False)
    attention = read_attention(
        fields,
        around["model_dim"],
        rotary=read_rotary(fields, max_length=around["max_length"], theta=THETA),
        biases=EVERY_BIAS if has_biases else (),
    )
    feed_forward = read_feed_forward(fields)
    use_bias = fields.take("mlp_bias", bool, False)
    feed_forward = dataclasses.replace(feed_forward, use_bias=use_bias)
    return of_layers([LayerConfig(attention, feed_forward)], fields, around)


def read_feed_forward(fields: Fields) -> FeedForwardConfig:
    """A gated feed-forward without biases."""
    activation = fields.choose("hidden_act", GATED)
    return FeedForwardConfig(fields.take("intermediate_size", int), activation)


def of_layers(
    layers: list[LayerConfig],
    fields: Fields,
    around: dict[str, Any],
    **more: Any,
) -> ModelConfig:
    """A model of layers that repeat, with RMSNorm; `more` are other arguments of `ModelConfig`."""
    norm = {"norm": NormConfig(epsilon=fields.take("rms_norm_eps", float))}
    return ModelConfig(pattern=pattern_of(layers), **norm | around | more)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    feed_forward = config.layers[0].feed_forward
    return write_dense(config) | {
        "attention_bias": bool(config.layers[0].attention.biases),
        "mlp_bias": getattr(feed_forward, "use_bias", False),
    }


def write_dense(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model's attention, norm and gated feed-forward of the last layer."""
    feed_forward = config.layers[-1].feed_forward
    return {
        **write_around(config),
        **write_attention(config),
        "intermediate_size": feed_forward.dim,
        "hidden_act": NAMES_OF_GATED.get(feed_forward.activation),
        "rms_norm_eps": config.norm.epsilon,
    }


def with_windows(attention: AttentionConfig, windows: list[int | None]) -> list[AttentionConfig]:
    """The attention of each layer."""
    return [dataclasses.replace(attention, window=window) for window in windows]


LLAMA = Family(("llama",), "LlamaForCausalLM", read, write, Layout(NAMES))
