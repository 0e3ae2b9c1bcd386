"""The reference over some queries at a time, on any device."""

import dataclasses
import functools

import jax
from jax import lax

from jaxscale.ops.attention import reference
from jaxscale.ops.attention.blocks import joined, split
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
    is_aligned = context.is_aligned
    keyed = dataclasses.replace(
        context,
        key_positions=context.positions if is_aligned else context.key_positions,
        key_segments=context.segments if is_aligned else context.key_segments,
    )

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(chunk: tuple[Array, Array, Array | None]) -> Array:
        q_chunk, positions, segments = chunk
        part = dataclasses.replace(keyed, positions=positions, segments=segments)
        return reference.attend(q_chunk, k, v, part)

    by_query = q, context.positions, context.segments
    chunks = jax.tree.map(lambda x: split(x, 1, QUERY_CHUNK), by_query)
    return joined(lax.map(one, chunks), 1, q.shape[1])


def refusal(q: Array, context: AttentionContext) -> str | None:
    """What of the request this backend cannot do, as the text of an error; None when it can."""
    if q.shape[1] % QUERY_CHUNK:
        return f"T % {QUERY_CHUNK} == 0, but T = {q.shape[1]}"
    return None
