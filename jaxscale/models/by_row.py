"""What of a model our kernels compute with the same bits for a token beside any others.

The rest is computed in tiles of one size, see `execution.BatchInvariant`; either way training and
serving decide alike, by the model's shape and the device.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxscale.models.config import LayerConfig, ModelConfig, NormConfig
from jaxscale.ops import by_row
from jaxscale.ops.attention import invariant
from jaxscale.ops.by_row import ByRow
from jaxscale.ops.device import kernel_family
from jaxscale.ops.linear import Joined
from jaxscale.ops.loss import Head, loss_of_logits, token_loss
from jaxscale.ops.precision import accumulator
from jaxscale.ops.tiles import over_tiles
from jaxscale.types import Array, Params

# The matrices of a dense layer, and what norms multiply by.
PARAMETERS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "scale")
LOSS_ROWS = 2048  # tokens whose logits exist at a time; no bit depends on it


def layer_has_kernels(
    params: Params,
    config: LayerConfig,
    norm: NormConfig,
    dtype: str,
) -> bool:
    """Whether a layer is computed by kernels here: a dense one of whole matrices, with RMSNorm."""
    attention = config.attention
    heads = attention.num_heads, attention.num_kv_heads, attention.head_dim
    is_plain = not config.is_moe and norm.kind == "rmsnorm" and attention.qk_norm != "all"
    is_whole = all(
        isinstance(part, jax.Array | Joined)
        for section in params.values()
        for name, part in section.items()
        if name in PARAMETERS
    )
    return is_plain and is_whole and invariant.has_kernels(*heads, dtype)


def ends_have_kernels(config: ModelConfig, dtype: str) -> bool:
    """Whether the final norm and the unembedding are computed by kernels here."""
    is_plain = config.norm.kind == "rmsnorm" and config.head_activation is None
    is_half = jnp.dtype(dtype).itemsize == 2
    return is_plain and is_half and kernel_family() == "mosaic"


def prepared(params: Params) -> Params:
    """Parameters of a layer, or of a norm, as `ops.linear` and `ops.norm` are to use them."""
    found: Params = {}
    for name, part in params.items():
        if name in PARAMETERS:
            found[name] = jax.tree.map(ByRow, part)
        else:
            found[name] = prepared(part) if isinstance(part, dict) else part
    return found


def logits(h: Array, head: Array | Head, softcap: float | None) -> Array:
    """As `ops.loss.unembed`; not differentiated."""
    matrix = head.weights if isinstance(head, Head) else head
    found = by_row.project(h.reshape(-1, h.shape[-1]), matrix)
    if isinstance(head, Head):
        found = found + accumulator(head.bias)
    if softcap is not None:
        found = softcap * jnp.tanh(found / softcap)
    return found.reshape(*h.shape[:-1], -1)


@functools.cache
def loss(softcap: float | None) -> Callable:
    """(h [B, T, D], head, labels [B, T]) -> as `ops.loss.token_loss`, whose gradients it has."""

    @by_row.with_gradients_of(functools.partial(token_loss, softcap=softcap))
    def of_tokens(h: Array, head: Array | Head, labels: Array) -> tuple[Array, Array]:
        def of_tile(tile: tuple[Array, Array]) -> tuple[Array, Array]:
            h, labels = tile
            return loss_of_logits(logits(h, head, softcap), labels, by_row.total)

        return over_tiles(of_tile, (h, labels), LOSS_ROWS)

    return of_tokens
