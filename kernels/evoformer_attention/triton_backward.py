"""The backward of the Evoformer's attention for any NVIDIA GPU since Ampere, of Triton kernels."""

from typing import Any

from jax import Array

from jaxscale.kernels.evoformer_attention.triton_key_gradients import key_gradients
from jaxscale.kernels.evoformer_attention.triton_pair_gradient import pair_gradient
from jaxscale.kernels.evoformer_attention.triton_query_gradient import query_gradient


def backward(
    operands: tuple[Array | None, ...],
    do: Array,
    top: Array,
    total: Array,
    delta: Array,
    *,
    interpret: Any = False,
) -> tuple[Array | None, ...]:
    """Gradients of q, k, v and both biases, None for a bias that is absent.

    Args:
        operands: q, k, v, mask_bias and pair_bias, as given to the forward.
        do: [B, M, T, N, H] cotangent of the output, in the type of `q`.
        top, total: [B, M, N, T], as the forward gives them.
        delta: [B, M, N, T] float32, products of the output and `do` summed over H.
        interpret: as for `triton_call.call`.
    """
    saved = do, top, total, delta
    dq = query_gradient(operands, *saved, interpret=interpret)
    dk, dv, dmask = key_gradients(operands, *saved, interpret=interpret)
    dpair = None
    if operands[4] is not None:
        dpair = pair_gradient(operands, *saved, interpret=interpret)
    return dq, dk, dv, dmask, dpair
