"""What of a model our kernels compute with the same bits for a token beside any others.

The rest is computed in tiles of one size, see `execution.BatchInvariant`; either way training and
serving decide alike, by the model's shape and the device.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.models.config import LayerConfig, ModelConfig, NormConfig
from jaxscale.ops import by_row, loss
from jaxscale.ops.attention import invariant
from jaxscale.ops.by_row import ByRow
from jaxscale.ops.device import kernel_family
from jaxscale.ops.linear import Joined
from jaxscale.ops.precision import Policy
from jaxscale.ops.tiles import over_tiles
from jaxscale.types import Array, Params


class Bound(Protocol):
    """What is asked here of a decoder."""

    config: ModelConfig
    policy: Policy
    execution: Any


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


def are_shapes_free(decoder: Bound, periods: tuple[Params, ...]) -> bool:
    """Whether no bit that is to be invariant depends on the shapes of a stack's products."""
    norm, dtype = decoder.config.norm, decoder.policy.compute
    return not decoder.execution.is_batch_invariant or all(
        layer_has_kernels(period[str(i)], layer, norm, dtype)
        for period in periods
        for i, layer in enumerate(decoder.config.pattern)
    )


def are_ends_by_row(decoder: Bound) -> bool:
    """Whether kernels give the final norm and the unembedding invariant bits, without tiles."""
    config = decoder.config
    is_plain = config.norm.kind == "rmsnorm" and config.head_activation is None
    is_half = jnp.dtype(decoder.policy.compute).itemsize == 2
    is_asked = decoder.execution.is_batch_invariant
    return is_asked and is_plain and is_half and kernel_family() == "mosaic"


def prepared(params: Params) -> Params:
    """Parameters of a layer, or of a norm, as `ops.linear` and `ops.norm` are to use them."""
    found: Params = {}
    for name, part in params.items():
        if name in PARAMETERS:
            found[name] = jax.tree.map(ByRow, part)
        else:
            found[name] = prepared(part) if isinstance(part, dict) else part
    return found


def logits(h: Array, head: Array | loss.Head, softcap: float | None) -> Array:
    """As `ops.loss.unembed`; not differentiated."""
    matrix = head.weights if isinstance(head, loss.Head) else head
    products = by_row.project(h.reshape(-1, h.shape[-1]), matrix)
    found = loss.biased_and_capped(products, head, softcap)
    return found.reshape(*h.shape[:-1], -1)


@functools.cache
def token_loss(softcap: float | None, num_rows: int | None) -> Callable:
    """(h [B, T, D], head, labels [B, T]) -> as `ops.loss.token_loss`, whose gradients it has.

    Args:
        softcap: of the logits.
        num_rows: of a tile, which is part of the bits; None for kernels, whose bits depend on none.
    """
    project = logits if num_rows is None else loss.unembed

    @by_row.with_gradients_of(functools.partial(loss.token_loss, softcap=softcap))
    def of_tokens(h: Array, head: Array | loss.Head, labels: Array) -> tuple[Array, Array]:
        def of_tile(tile: tuple[Array, Array]) -> tuple[Array, Array]:
            h, labels = tile
            # As serving does: the logits first, then their sums.
            found = lax.optimization_barrier(project(h, head, softcap))
            return loss.loss_of_logits(found, labels, by_row.total)

        return over_tiles(of_tile, (h, labels), num_rows or LOSS_ROWS)

    return of_tokens
