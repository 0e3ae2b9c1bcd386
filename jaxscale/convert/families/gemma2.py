"""Gemma 2: norms before and after, soft-caps, and windows in every other layer, the first included.

Source: Gemma Team 2024 (arXiv 2408.00118).
"""

import math
from collections.abc import Collection
from typing import Any

from jaxscale.convert.families import llama
from jaxscale.convert.family import (
    EVERY_BIAS,
    GATED,
    Family,
    pattern_of,
    read_around,
    read_attention,
    read_windows,
    write_windows,
)
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.convert.rotary import read_rotary
from jaxscale.models.config import FeedForwardConfig, LayerConfig, ModelConfig, NormConfig
from jaxscale.types import check_positive

NAMES = llama.NAMES | {
    "attention/norm_after": "post_attention_layernorm",
    "ffn/norm": "pre_feedforward_layernorm",
    "ffn/norm_after": "post_feedforward_layernorm",
}


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    around = read_around(fields, names)
    scalar = fields.take("query_pre_attn_scalar", float)
    check_positive(fields.place("query_pre_attn_scalar"), scalar)
    attention = read_attention(
        fields,
        around["model_dim"],
        rotary=read_rotary(fields, max_length=around["max_length"]),
        biases=EVERY_BIAS if fields.take("attention_bias", bool) else (),
        softcap=fields.take("attn_logit_softcapping", float | None, None),
        scale=scalar**-0.5,
    )
    activation = fields.choose("hidden_activation", GATED)
    fields.expect("hidden_act", "gelu_pytorch_tanh")  # older files have it twice
    fields.expect("use_bidirectional_attention", False)
    fields.expect("cache_implementation", "hybrid")
    feed_forward = FeedForwardConfig(fields.take("intermediate_size", int), activation)
    windows = read_windows(fields, around["num_layers"], slides=lambda number: number % 2 == 0)
    layers = [
        LayerConfig(each, feed_forward, norm_position="both")
        for each in llama.with_windows(attention, windows)
    ]
    norm = NormConfig(epsilon=fields.take("rms_norm_eps", float), scale_offset=1.0)
    return ModelConfig(
        pattern=pattern_of(layers),
        norm=norm,
        embedding_scale=math.sqrt(around["model_dim"]),
        logit_softcap=fields.take("final_logit_softcapping", float | None, None),
        **around,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    fields = llama.write_dense(config) | write_windows(config)
    attention = config.layers[0].attention
    activation = fields.pop("hidden_act")
    scale = attention.scale or attention.head_dim**-0.5
    return fields | {
        "hidden_activation": activation,
        "attention_bias": bool(attention.biases),
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


GEMMA2 = Family(("gemma2",), "Gemma2ForCausalLM", read, write, Layout(NAMES))
