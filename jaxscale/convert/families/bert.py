"""BERT with its head for hidden tokens: bidirectional, norms of the sums with the residual.

The pooler and the head for pairs of sentences are read where a file has them.

Source: Devlin et al. 2018 (arXiv 1810.04805).
"""

from collections.abc import Collection
from typing import Any

from jaxscale.convert.family import EVERY_BIAS, Family, read_attention
from jaxscale.convert.fields import Fields
from jaxscale.convert.places import Layout
from jaxscale.models.config import FeedForwardConfig, LayerConfig, ModelConfig, NormConfig

ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
OF_TRAINING = (
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "gradient_checkpointing",
    "hidden_dropout_prob",
)
POOLER, PAIR = "bert.pooler.dense.weight", "cls.seq_relationship.weight"
NAMES = {
    "embedding/tokens": "bert.embeddings.word_embeddings",
    "embedding/positions": "bert.embeddings.position_embeddings",
    "embedding/types": "bert.embeddings.token_type_embeddings",
    "embedding/norm": "bert.embeddings.LayerNorm",
    "final_norm/dense": "cls.predictions.transform.dense",
    "final_norm": "cls.predictions.transform.LayerNorm",
    "head/bias": "cls.predictions",
    "pooler/dense": "bert.pooler.dense",
    "pooler/pair": "cls.seq_relationship",
    "attention/q": "attention.self.query",
    "attention/k": "attention.self.key",
    "attention/v": "attention.self.value",
    "attention/o": "attention.output.dense",
    "attention/norm_after": "attention.output.LayerNorm",
    "ffn/up": "intermediate.dense",
    "ffn/down": "output.dense",
    "ffn/norm_after": "output.LayerNorm",
}


def read(fields: Fields, names: Collection[str]) -> ModelConfig:
    """The model of a config.json."""
    dim = fields.count("hidden_size")
    fields.expect("position_embedding_type", "absolute")
    fields.expect("add_cross_attention", False)
    fields.expect("is_decoder", False)  # it would be causal
    fields.expect("tie_word_embeddings", True)
    for name in OF_TRAINING:
        fields.take(name, Any, None)
    activation = fields.choose("hidden_act", ACTIVATIONS)
    attention = read_attention(fields, dim, rotary=None, biases=EVERY_BIAS)
    feed_forward = FeedForwardConfig(fields.take("intermediate_size", int), activation, True)
    return ModelConfig(
        vocab_size=fields.take("vocab_size", int),
        num_layers=fields.count("num_hidden_layers"),
        model_dim=dim,
        max_length=fields.take("max_position_embeddings", int),
        pattern=(LayerConfig(attention, feed_forward, norm_position="sum"),),
        norm=NormConfig("layernorm", fields.take("layer_norm_eps", float), use_bias=True),
        is_causal=False,
        use_learned_positions=True,
        num_token_types=fields.take("type_vocab_size", int),
        use_embedding_norm=True,
        head_activation=activation,
        use_pooler=POOLER in names,
        use_pair_head=PAIR in names,
        is_tied=True,
        use_head_bias=True,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model."""
    layer = config.layers[0]
    names = {value: name for name, value in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": layer.attention.num_heads,
        "intermediate_size": layer.feed_forward.dim,
        "hidden_act": names.get(layer.feed_forward.activation),
        "layer_norm_eps": config.norm.epsilon,
        "type_vocab_size": config.num_token_types,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }


LAYOUT = Layout(NAMES, layer="bert.encoder.layer.{layer}.")
BERT = Family(("bert",), "BertForMaskedLM", read, write, LAYOUT, has_score=False)
