"""One vector of a text, out of its first token, and whether two sentences follow each other."""

import jax.numpy as jnp

from jaxscale.models.decoder import Decoder
from jaxscale.ops.linear import linear
from jaxscale.types import Array, Batch, InputError, Params


def pooled(decoder: Decoder, params: Params, batch: Batch) -> Array:
    """tanh(W x + b) of the first token of each row, on one device.

    Source: Devlin et al. 2018, BERT (arXiv 1810.04805), section 3.1; its released code pools so.
    Args:
        decoder: a model with a pooler.
        params: the parameter tree.
        batch: as `Decoder.logits` takes it.
    Returns:
        [B, D].
    Raises:
        InputError: the model has no pooler.
    """
    if not decoder.config.use_pooler:
        raise InputError("ModelConfig.use_pooler", False, "True for a vector of a whole text")
    x = decoder.embed(params, batch)
    x, _, _ = decoder.run_layers(params, x, decoder.tokens(batch))
    pooler = decoder.to_compute("pooler", params["pooler"])
    return jnp.tanh(linear("bd,dh->bh", x[:, 0], pooler["dense"]) + pooler["dense_bias"])


def pair_logits(decoder: Decoder, params: Params, batch: Batch) -> Array:
    """[B, 2] logits: that a row's second sentence follows its first, and that it does not.

    Source: Devlin et al. 2018, BERT (arXiv 1810.04805), section 3.1, task 2, next sentence.
    Args:
        decoder: a model with a pooler and a head for pairs.
        params: the parameter tree.
        batch: as `pooled`; its `types` are 0 in the first sentence and 1 in the second.
    Raises:
        InputError: the model has no head for pairs.
    """
    if not decoder.config.use_pair_head:
        raise InputError("ModelConfig.use_pair_head", False, "True for logits of two sentences")
    head = decoder.to_compute("pooler", params["pooler"])
    x = pooled(decoder, params, batch)
    return linear("bh,hy->by", x, head["pair"]) + head["pair_bias"]
