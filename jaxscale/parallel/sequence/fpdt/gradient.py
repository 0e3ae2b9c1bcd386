"""A layer in chunks, differentiable.

Source: Yao et al. 2024 (arXiv 2408.16978), section 5.3.
"""

from typing import Any

import jax

from jaxscale.parallel.sequence.fpdt.by_keys import ByKeys
from jaxscale.parallel.sequence.fpdt.by_queries import ByQueries
from jaxscale.parallel.sequence.fpdt.stream import Residuals, Stream, Tokens
from jaxscale.types import Array, Params


def stream_layer(
    stream: Stream,
    params: Params,
    x: Array,
    tokens: Tokens,
) -> tuple[Array, Any]:
    """The layer of `Stream.forward`, differentiable in `params` and `x`.

    Args:
        stream: the layer.
        params, x, tokens: as for `Stream.forward`.
    Returns:
        (residual [B, own T, D], what the router chose, [B, T, ...], or None).
    Cost: of what the forward computes, the backward makes projections and feed-forwards again.
    """

    @jax.custom_vjp
    def run(*arguments: Any) -> tuple[Array, Any]:
        return stream.forward(*arguments)[0]

    def backward(residuals: Residuals, cotangents: tuple[Array, Any]) -> tuple:
        order = ByQueries if stream.places.chunks == "device" else ByKeys
        return order(stream, residuals, cotangents).run()

    run.defvjp(stream.forward, backward)
    return run(params, x, tokens)
