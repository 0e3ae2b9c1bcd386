"""One value a token in the place of logits, as reward models and critics have."""

from jaxscale.models.decoder import Decoder
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, InputError, Params


def token_values(
    decoder: Decoder,
    params: Params,
    x: Array,
) -> Array:
    """w h of each own token, in at least float32, h being what the unembedding would take.

    Source: Stiennon et al. 2020 (arXiv 2009.01325), section 3.4, the linear head of the reward.
    Args:
        decoder: bound to the mesh's operations; its model has a value head.
        params: the parameter tree.
        x: residual after the layers, [B, own T, D].
    Returns:
        [B, own T].
    Raises:
        InputError: the model has no value head.
    """
    if not decoder.config.use_value_head:
        raise InputError("ModelConfig.use_value_head", False, "True for values of tokens")
    collectives = decoder.operations.collectives
    h = collectives.own_tokens(decoder.hidden(params, x))
    head = collectives.gather_parameters("value_head", params["value_head"])
    # A sum and no matmul, for which a GPU would round float32 to fewer bits.
    return (accumulator(h) * head["weights"][0]).sum(-1)
