"""The operations that a mesh injects into a model: on one device each is the identity or the plain function."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxscale.ops import attention, loss, moe
from jaxscale.types import Array

EXCHANGED = "exchanged"  # names what other devices sent and a rematerialisation had better keep: as small as a residual


def _embed(table: Array, tokens: Array) -> Array:
    is_known = (tokens >= 0) & (tokens < len(table))
    return jnp.where(is_known[..., None], table[jnp.clip(tokens, 0, len(table) - 1)], 0)


def _identity(x: Any) -> Any:
    return x


def _mark(name: str, x: Array) -> Array:
    return checkpoint_name(x, name.rsplit("/", 1)[-1])


def _first(num: int) -> int:
    return 0


def _stored(section: str, params: Any) -> Any:
    return params


def _between(f: Callable, project: Callable, x: Array, *rows: Any) -> tuple[Array, Any]:
    hidden, kept = f(x, *rows)
    return project(hidden), kept


@dataclasses.dataclass(frozen=True)
class Operations:
    """What a model calls wherever a mesh could matter; the defaults are one device.

    The residual stream between `exit` and `enter` belongs to this device alone (on a mesh: its
    tokens only), so every token's loss is counted on exactly one device and a parameter's gradient
    is the sum over the devices that hold it.

    Args:
        attention: (q, k, v, context, cache) -> (output, cache); owns the cache's layout.
        experts: as `ops.moe.experts` -> this device's part of the output, summed by `exit`.
        first_hidden: (number of local elements of an expert's hidden vector) -> number of the first
            one.
        gather: (section, params) -> params as the forward uses them; section is "embedding",
            "layers/0", "head" ...
        enter: residual [B, own T, D] -> [B, T, D], input of column-parallel matmuls.
        exit: [B, T, D] partial sums of row-parallel matmuls -> residual [B, own T, D].
        between: (f, project, x, *rows) -> (residual [B, own T, D], what `f` kept): what the matmuls
            after `enter` and before `exit` enclose. x is the normalised residual [B, own T, D];
            f([b, T, D], *rows of as many) returns (hidden, what it keeps) and treats rows alike: of
            some of the rows those rows of what it returns of all; project(hidden) is the last
            matmul, partial sums [b, T, D]; rows are trees of [B, T, ...] known to the whole tensor
            group.
        own: [B, T, ...] known to the whole tensor group -> the own tokens [B, own T, ...]; a share
            of all B T tokens in the order of rows, so its rows are not the batch's: only what
            treats tokens alike may read it.
        embed: (table [V, D], tokens [B, T]) -> residual [B, own T, D]; 0 for a token outside the
            table.
        token_loss: (h [B, T, D], head as `ops.loss` has it, labels [B, T], softcap) -> (nll,
            log-normaliser) of the own tokens; nll 0 for a label outside the vocabulary.
        mark: (path, x) -> x; names a tensor for rematerialisation policies by the last part of its
            path, and lets a diagnosis look at it.
        total: sums over the tokens of all devices a figure that is not differentiated.
    """

    attention: Callable = attention.attention
    experts: Callable = moe.experts
    first_hidden: Callable = _first
    gather: Callable = _stored
    enter: Callable = _identity
    exit: Callable = _identity
    between: Callable = _between
    own: Callable = _identity
    embed: Callable = _embed
    token_loss: Callable = loss.token_loss
    mark: Callable = _mark
    total: Callable = _identity
