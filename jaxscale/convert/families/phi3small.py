"""Phi-3-small: block-sparse layers between dense ones, muP multipliers and a clamped GEGLU.

Fused projections are interleaved: those of the queries, the key and the value of each kv head lie
together, and so do the gate and the linear part of each hidden element. Tokens that its tokenizer
has not ("dummy tokens") are the tokenizer's to know; decoding draws none beyond its vocabulary.
Source: Abdin et al. 2024 (arXiv 2404.14219), section 2.1, and the released configuration.
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.families import llama
from jaxscale.convert.family import EVERY_BIAS, Family, pattern_of, read_attention, read_tied
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.convert.rotary import LONGROPE_WITH_MAGNITUDES, read_rotary, write_magnitudes
from jaxscale.models.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
    RotaryConfig,
)
from jaxscale.ops.attention import BLOCK, BlockLayout
from jaxscale.types import InputError, check_positive

LIMIT = 20.0  # of the clamped GEGLU, see `ops.activation`
NAMES = llama.NAMES | {
    "final_norm": "model.final_layernorm",
    "attention/q": "self_attn.query_key_value",
    "attention/k": "self_attn.query_key_value",
    "attention/v": "self_attn.query_key_value",
    "attention/o": "self_attn.dense",
    "ffn/gate": "mlp.up_proj",
    "ffn/up": "mlp.up_proj",
}
# Of the training, of how a kernel was run, or of how long rows were made.
UNREAD = (
    "attention_dropout_prob",
    "blocksparse_triton_kernel_block_size",
    "embedding_dropout_prob",
    "ff_dim_multiplier",
    "ffn_dropout_prob",
    "gegelu_pad_to_256",
    "pad_sequence_to_multiple_of_64",
    "reorder_and_upcast_attn",
)


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    model_dim = fields.count("hidden_size")
    length = fields.take("max_position_embeddings", int)
    attention = _attention(fields, model_dim, length)
    for name in UNREAD:
        fields.take(name, Any, None)
    fields.expect("hidden_act", "gegelu")
    fields.expect("gegelu_limit", LIMIT)
    dim = fields.take("ff_intermediate_size", int)
    feed_forward = FeedForwardConfig(dim, "gegelu", use_bias=True)
    epsilon = fields.take("layer_norm_epsilon", float)
    width = fields.take("mup_width_multiplier", float)
    check_positive(fields.place("mup_width_multiplier"), width)
    num_layers = fields.count("num_hidden_layers")
    layout, every = _layout(fields), fields.count("dense_attention_every_n_layers")
    layers = []
    for number in range(num_layers):
        is_dense = (number + 1) % every == 0
        own = dict(attention, layout=None if is_dense else layout)
        layers.append(LayerConfig(AttentionConfig(**own), feed_forward))
    return ModelConfig(
        vocab_size=fields.take("vocab_size", int),
        num_layers=num_layers,
        model_dim=model_dim,
        max_length=length,
        pattern=pattern_of(layers),
        norm=NormConfig("layernorm", epsilon, use_bias=True),
        embedding_scale=fields.take("mup_embedding_multiplier", float),
        unembedding_scale=1 / width,
        is_tied=read_tied(fields, names),
    )


def _attention(
    fields: Fields,
    model_dim: int,
    length: int,
) -> dict[str, Any]:
    """The arguments of `AttentionConfig` of every layer."""
    fields.expect("attention_bias", False)  # says nothing: the projections have biases all the same
    fields.expect("rope_position_scale", 1.0)
    base = fields.take("rope_embedding_base", float)
    rotary = read_rotary(
        fields,
        max_length=length,
        theta=base,
        scalings=LONGROPE_WITH_MAGNITUDES,
    )
    plain = read_attention(fields, model_dim)
    scale = fields.take("mup_attn_multiplier", float) / plain.head_dim
    if not fields.take("mup_use_scaling", bool):  # of attention alone
        scale = plain.head_dim**-0.5
    return {
        "num_heads": plain.num_heads,
        "num_kv_heads": plain.num_kv_heads,
        "head_dim": plain.head_dim,
        "rotary": rotary,
        "biases": EVERY_BIAS,
        "scale": scale,
    }


def _layout(fields: Fields) -> BlockLayout:
    fields.expect("blocksparse_homo_head_pattern", False)
    size = fields.take("blocksparse_block_size", int)
    if size != BLOCK:
        raise InputError(fields.place("blocksparse_block_size"), size, str(BLOCK))
    numbers = []
    for name in ("blocksparse_num_local_blocks", "blocksparse_vert_stride"):
        numbers.append(fields.take(name, int))
        check_positive(fields.place(name), numbers[-1])
    return BlockLayout(*numbers)


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    attention = config.layers[0].attention
    layout = attention.layout or BlockLayout(1, 1)
    rotary = write_magnitudes(attention.rotary or RotaryConfig())
    dense = [number for number, layer in enumerate(config.layers, 1) if not layer.attention.layout]
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "rope_embedding_base": rotary.pop("rope_theta"),
        "rope_position_scale": 1.0,
        **rotary,
        "ff_intermediate_size": config.layers[0].feed_forward.dim,
        "hidden_act": "gegelu",
        "gegelu_limit": LIMIT,
        "layer_norm_epsilon": config.norm.epsilon,
        "mup_use_scaling": True,
        "mup_attn_multiplier": (attention.scale or 0.0) * attention.head_dim,
        "mup_embedding_multiplier": config.embedding_scale,
        "mup_width_multiplier": 1 / config.unembedding_scale,
        "dense_attention_every_n_layers": dense[0] if dense else config.num_layers + 1,
        "blocksparse_block_size": BLOCK,
        "blocksparse_num_local_blocks": layout.local,
        "blocksparse_vert_stride": layout.stride,
        "blocksparse_homo_head_pattern": False,
        "tie_word_embeddings": config.is_tied,
    }


INTERLEAVED = {"self_attn.query_key_value": "K", "mlp.up_proj": "F"}
PHI3_SMALL = Family(
    ("phi3small",),
    "Phi3SmallForCausalLM",
    read,
    write,
    Layout(NAMES, interleaved=INTERLEAVED),
    has_score=False,
)
