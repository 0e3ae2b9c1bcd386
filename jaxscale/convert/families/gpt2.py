"""GPT-2, and the LLM-jp models of v1: learned positions, fused matrices that are [in, out].

Stated default: a file without `n_inner` means four times the width.
Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.family import EVERY_BIAS, Family, read_tied
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.models.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
)
from jaxscale.types import InputError

GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
NAMES = {
    "embedding/tokens": "transformer.wte",
    "embedding/positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "attention/norm": "ln_1",
    "attention/q": "attn.c_attn",
    "attention/k": "attn.c_attn",
    "attention/v": "attn.c_attn",
    "attention/o": "attn.c_proj",
    "ffn/norm": "ln_2",
    "ffn/up": "mlp.c_fc",
    "ffn/down": "mlp.c_proj",
}


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    dim, num_heads = fields.count("n_embd"), fields.count("n_head")
    head_dim, rest = divmod(dim, num_heads)
    if rest:
        raise InputError(fields.place("n_head"), num_heads, f"a divisor of n_embd = {dim}")
    for name in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        fields.expect(name, False)
    fields.expect("scale_attn_weights", True)
    fields.take("reorder_and_upcast_attn", bool, False)  # the order of a sum
    for name in (
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "n_ctx",
    ):
        fields.take(name, Any, None)  # of a head for classification; the old name of n_positions
    inner = fields.take("n_inner", int, 4 * dim)
    activation = fields.choose("activation_function", GELU)
    epsilon = fields.take("layer_norm_epsilon", float)
    attention = AttentionConfig(num_heads, num_heads, head_dim, rotary=None, biases=EVERY_BIAS)
    feed_forward = FeedForwardConfig(inner, activation, use_bias=True)
    return ModelConfig(
        vocab_size=fields.take("vocab_size", int),
        num_layers=fields.count("n_layer"),
        model_dim=dim,
        max_length=fields.take("n_positions", int),
        pattern=(LayerConfig(attention, feed_forward),),
        norm=NormConfig("layernorm", epsilon, use_bias=True),
        use_learned_positions=True,
        is_tied=read_tied(fields, names),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.model_dim,
        "n_head": config.layers[0].attention.num_heads,
        "n_inner": config.layers[0].feed_forward.dim,
        "n_positions": config.max_length,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm.epsilon,
        "tie_word_embeddings": config.is_tied,
    }


LAYOUT = Layout(NAMES, layer="transformer.h.{layer}.", is_input_first=True)
GPT2 = Family(("gpt2",), "GPT2LMHeadModel", read, write, LAYOUT)
