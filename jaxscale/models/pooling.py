"""One vector of a text, out of its first token."""

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
