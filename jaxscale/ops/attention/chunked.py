"""The reference over some queries at a time, on any device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.attention import reference
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.types import Array

QUERY_CHUNK = 512


def attend(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
) -> Array:
    """The reference over QUERY_CHUNK queries at a time; arguments as `ops.attention.attention`.

    Each chunk is recomputed in the backward, so that only [chunk, S] logits ever exist.
    """
    num_chunks = q.shape[1] // QUERY_CHUNK
    is_aligned = context.is_aligned
    keyed = dataclasses.replace(
        context,
        key_positions=context.positions if is_aligned else context.key_positions,
        key_segments=context.segments if is_aligned else context.key_segments,
    )

    def split(x: Array | None) -> Array | None:
        if x is None:
            return None
        by_chunk = x.reshape(x.shape[0], num_chunks, QUERY_CHUNK, *x.shape[2:])
        return jnp.moveaxis(by_chunk, 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(chunk: tuple[Array, Array, Array | None]) -> Array:
        q_chunk, positions, segments = chunk
        part = dataclasses.replace(keyed, positions=positions, segments=segments)
        return reference.attend(q_chunk, k, v, part)

    out = lax.map(one, (split(q), split(context.positions), split(context.segments)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def refusal(q: Array, context: AttentionContext) -> str | None:
    """What of the request this backend cannot do, as the text of an error; None when it can."""
    if q.shape[1] % QUERY_CHUNK:
        return f"T % {QUERY_CHUNK} == 0, but T = {q.shape[1]}"
    return None
