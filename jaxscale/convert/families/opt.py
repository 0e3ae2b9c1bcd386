"""OPT: learned positions after two rows that no token reads, ReLU, and biases everywhere.

Source: Zhang et al. 2022 (arXiv 2205.01068).
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.family import EVERY_BIAS, Family, read_around, read_attention, write_around
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.models.config import FeedForwardConfig, LayerConfig, ModelConfig, NormConfig

EPSILON = 1e-5  # torch's, which no file gives
NAMES = {
    "embedding/tokens": "model.decoder.embed_tokens",
    "embedding/positions": "model.decoder.embed_positions",
    "final_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
    "attention/norm": "self_attn_layer_norm",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.out_proj",
    "ffn/norm": "final_layer_norm",
    "ffn/up": "fc1",
    "ffn/down": "fc2",
}


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    around = read_around(fields, names)
    fields.expect("do_layer_norm_before", True)
    fields.expect("word_embed_proj_dim", around["model_dim"])
    fields.expect("enable_bias", True)
    fields.expect("layer_norm_elementwise_affine", True)
    fields.expect("_remove_final_layer_norm", False)
    for name in ("layerdrop", "init_std", "activation_dropout", "prefix"):
        fields.take(name, Any, None)  # of the training; what a prompt began with
    activation = fields.choose("activation_function", {"relu": "relu"})
    attention = read_attention(fields, around["model_dim"], rotary=None, biases=EVERY_BIAS)
    feed_forward = FeedForwardConfig(fields.take("ffn_dim", int), activation, use_bias=True)
    return ModelConfig(
        pattern=(LayerConfig(attention, feed_forward),),
        norm=NormConfig("layernorm", EPSILON, use_bias=True),
        use_learned_positions=True,
        **around,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    return write_around(config) | {
        "num_attention_heads": config.layers[0].attention.num_heads,
        "ffn_dim": config.layers[0].feed_forward.dim,
        "word_embed_proj_dim": config.model_dim,
        "activation_function": "relu",
        "do_layer_norm_before": True,
    }


LAYOUT = Layout(NAMES, layer="model.decoder.layers.{layer}.", num_unread_positions=2)
OPT = Family(("opt",), "OPTForCausalLM", read, write, LAYOUT)
