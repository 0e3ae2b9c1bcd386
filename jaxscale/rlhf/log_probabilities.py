"""What a model, and the reference beneath its adapters, make of the tokens of answers."""

from jax import lax

from jaxscale.models.decoder import Decoder
from jaxscale.models.lora import base, without_adapters
from jaxscale.models.losses import token_log_probabilities
from jaxscale.types import Array, Batch, Params


def log_probabilities(decoder: Decoder, params: Params, batch: Batch) -> Array:
    """log p of each own token's label, [B, own T], with a gradient.

    Args:
        decoder: bound to the mesh's operations.
        params: the parameter tree.
        batch: tokens, labels, weights, positions and optionally segments, [B, T].
    """
    x = decoder.embed(params, batch)
    x, _, _ = decoder.run_layers(params, x, decoder.tokens(batch))
    return token_log_probabilities(decoder, params, x, batch["labels"])


def reference_log_probabilities(decoder: Decoder, params: Params, batch: Batch) -> Array:
    """The same of the model without its adapters, without a gradient; arguments likewise."""
    reference = Decoder(
        without_adapters(decoder.config), decoder.operations, decoder.policy, decoder.execution
    )
    return log_probabilities(reference, lax.stop_gradient(base(params)), batch)
