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
        [B, D], in the type of the compute.
    Raises:
        InputError: the model has no pooler.
    """
    if not decoder.config.use_pooler:
        expected = "True for a vector of a whole text"
        raise InputError("ModelConfig.use_pooler", False, expected)
    tokens = decoder.tokens(batch)
    x = decoder.embed(params, batch)
    x, _, _ = decoder.run_layers(params, x, tokens)
    first = x[:, 0]
    pooler = decoder.to_compute("pooler", params["pooler"])
    product = linear("bd,dh->bh", first, pooler["dense"])
    return jnp.tanh(product + pooler["dense_bias"])


def pair_logits(decoder: Decoder, params: Params, batch: Batch) -> Array:
    """Logits that a row's second sentence follows its first, and that it does not.

    Source: Devlin et al. 2018, BERT (arXiv 1810.04805), section 3.1, task 2, next sentence.
    Args:
        decoder: a model with a pooler and a head for pairs.
        params: the parameter tree.
        batch: as `pooled`; its `types` are 0 in the first sentence and 1 in the second.
    Returns:
        [B, 2], in the type of the compute.
    Raises:
        InputError: the model has no head for pairs.
    """
    if not decoder.config.use_pair_head:
        expected = "True for logits of two sentences"
        raise InputError("ModelConfig.use_pair_head", False, expected)
    x = pooled(decoder, params, batch)
    pooler = decoder.to_compute("pooler", params["pooler"])
    product = linear("bh,hy->by", x, pooler["pair"])
    return product + pooler["pair_bias"]
