"""What stands around the layers: what is added to an embedding, and what is made for the logits."""

from collections.abc import Callable

from jaxscale.models.config import ModelConfig
from jaxscale.models.layers import normalise
from jaxscale.ops.activation import activate
from jaxscale.ops.embedding import look_up
from jaxscale.ops.linear import linear
from jaxscale.types import Array, Batch, InputError, Params


def complete(
    embedding: Params,
    x: Array,
    batch: Batch,
    config: ModelConfig,
    own_tokens: Callable[[Array], Array],
) -> Array:
    """Embeddings of tokens [B, own T, D] with those of positions and types, normalised.

    Args:
        embedding: the parameters.
        x: embeddings of the tokens.
        batch: with positions [B, T], and types [B, T] of which a model with types takes the first
            where there are none.
        config: the model.
        own_tokens: [B, T] -> [B, own T], what of it belongs to this device.
    """
    if config.embedding_scale != 1:
        x = x * config.embedding_scale
    if config.use_learned_positions:
        x = x + look_up(embedding["positions"], own_tokens(batch["positions"]))
    if config.num_token_types:
        table, types = embedding["types"], batch.get("types")
        x = x + (table[0] if types is None else look_up(table, own_tokens(types)))
    if config.use_embedding_norm:
        x = normalise(embedding["norm"], x, config.norm)
    return x


def finished(norm: Params, x: Array, config: ModelConfig) -> Array:
    """The final norm of the residual [B, T, D], after the dense layer before it if there is one."""
    if config.head_activation is not None:
        x = linear("btd,dh->bth", x, norm["dense"]) + norm["dense_bias"]
        x = activate(config.head_activation, None, x)
    return normalise(norm, x, config.norm)


def check_has_logits(config: ModelConfig) -> None:
    """Raises InputError for a model that has values in the place of logits."""
    if config.use_value_head:
        expected = "False for logits: a model with values has none, see `jaxscale score`"
        raise InputError("ModelConfig.use_value_head", True, expected)
