"""Phi-1, Phi-1.5 and Phi-2: attention and feed-forward side by side, partly rotary, with biases.

Source: Li et al. 2023 (arXiv 2309.05463).
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.families import llama
from jaxscale.convert.family import (
    EVERY_BIAS,
    Family,
    read_around,
    read_attention,
    write_around,
    write_attention,
)
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.convert.rotary import read_rotary
from jaxscale.models.config import FeedForwardConfig, LayerConfig, ModelConfig, NormConfig

GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
NAMES = llama.NAMES | {
    "final_norm": "model.final_layernorm",
    "attention/o": "self_attn.dense",
    "ffn/up": "mlp.fc1",
    "ffn/down": "mlp.fc2",
}


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    around = read_around(fields, names)
    length = around["max_length"]
    rotary = read_rotary(fields, max_length=length, is_partial=True, scalings={})
    attention = read_attention(fields, around["model_dim"], rotary=rotary, biases=EVERY_BIAS)
    activation = fields.choose("hidden_act", GELU)
    fields.expect("qk_layernorm", False)
    dim = fields.take("intermediate_size", int)
    feed_forward = FeedForwardConfig(dim, activation, use_bias=True)
    layer = LayerConfig(attention, feed_forward, is_parallel=True)
    epsilon = fields.take("layer_norm_eps", float)
    norm = NormConfig("layernorm", epsilon, use_bias=True)
    return ModelConfig(pattern=(layer,), norm=norm, use_head_bias=True, **around)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    return {
        **write_around(config),
        **write_attention(config),
        "intermediate_size": config.layers[0].feed_forward.dim,
        "hidden_act": "gelu_new",
        "layer_norm_eps": config.norm.epsilon,
        "qk_layernorm": False,
    }


PHI = Family(("phi",), "PhiForCausalLM", read, write, Layout(NAMES))
