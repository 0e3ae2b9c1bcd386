"""What a model, and the reference beneath its adapters, make of the tokens of answers."""

from jax import lax

from jaxscale.models.decoder import Decoder
from jaxscale.models.lora import base, without_adapters
from jaxscale.models.losses import token_log_probabilities
from jaxscale.types import Array, Batch, Params


def residual(decoder: Decoder, params: Params, batch: Batch) -> Array:
    """The residual after the layers, [B, own T, D], of a forward that draws nothing.

    Dropout would make an answer's probability differ from that of the model which wrote it, or
    which is the reference.

    Args:
        decoder: bound to the mesh's operations.
        params: the parameter tree.
        batch: tokens, weights, positions and optionally segments, [B, T].
    """
    tokens = decoder.tokens(batch)._replace(draws=None)
    x, _, _ = decoder.run_layers(params, decoder.embed(params, batch), tokens)
    return x


def log_probabilities(decoder: Decoder, params: Params, batch: Batch) -> Array:
    """log p of each own token's label, [B, own T], with a gradient.

    Args:
        decoder: bound to the mesh's operations.
        params: the parameter tree.
        batch: tokens, labels, weights, positions and optionally segments, [B, T].
    """
    x = residual(decoder, params, batch)
    return token_log_probabilities(decoder, params, x, batch["labels"])


def reference_log_probabilities(decoder: Decoder, params: Params, batch: Batch) -> Array:
    """The same of the model without its adapters, without a gradient; arguments likewise."""
    reference = Decoder(
        without_adapters(decoder.config), decoder.operations, decoder.policy, decoder.execution
    )
    return log_probabilities(reference, lax.stop_gradient(base(params)), batch)
