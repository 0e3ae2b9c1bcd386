"""Attention over pages by our kernels: how a flat row of tokens is handed to them."""

import jax.numpy as jnp

from jaxscale.kernels.attention.api import attention
from jaxscale.kernels.paged_attention import api as kernel
from jaxscale.kernels.paged_attention.ragged import Sequences
from jaxscale.ops.attention import pages
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.ops.attention.paged_cache import PagedCache, RaggedRows
from jaxscale.types import Array

FAMILIES = ("mosaic", "triton")
FEW = 64  # sequences for which a kernel writes their keys too; of more, XLA's scatters cost little


def writes_itself(
    implementation: str,
    q: Array,
    cache: PagedCache,
    rows: RaggedRows,
) -> bool:
    """Whether one kernel writes the keys of a few sequences and attends."""
    values, _ = pages.parts(cache.k)
    is_few = len(rows.block_table) == q.shape[1] < FEW
    is_known = implementation == "mosaic"
    return is_known and is_few and kernel.writing_refusal("mosaic", q[0], values) is None


def _single_intervals(
    context: AttentionContext,
    rows: RaggedRows,
) -> tuple[Array, Array]:
    """The keys low <= s < high that the first D tokens see; none for padding and for prompts."""
    num = len(rows.block_table)
    is_single = rows.segments[:num] == 0
    high = jnp.where(is_single, context.positions[0, :num] + 1, 0)
    if context.window is None:
        return jnp.zeros_like(high), high
    return jnp.maximum(high - context.window, 0), high


def over_few(
    q: Array,
    new: tuple[Array, Array],
    context: AttentionContext,
    cache: PagedCache,
    rows: RaggedRows,
) -> tuple[Array, PagedCache]:
    """(attention [D, N, H] of sequences that all decode, the cache with their new keys)."""
    o, kept = kernel.write_and_attend(
        q,
        new,
        (cache.k, cache.v),
        rows.block_table,
        *_single_intervals(context, rows),
        scale=context.logits_scale(q.shape[2]),
        softcap=context.softcap,
        layout=context.layout,
        implementation="mosaic",
    )
    return o, PagedCache(*kept)


def over_all(
    q: Array,
    context: AttentionContext,
    cache: PagedCache,
    rows: RaggedRows,
) -> Array:
    """Attention of all tokens [T, N, H], in one launch; 0 for padding."""
    (k, k_scales), (v, v_scales) = pages.parts(cache.k), pages.parts(cache.v)
    listed, sequences = sequences_of(rows, context.positions[0])
    return kernel.ragged_attention(
        q,
        k,
        v,
        listed,
        sequences,
        None if k_scales is None else (k_scales, v_scales),
        num_single=len(rows.block_table),
        window=context.window,
        scale=context.logits_scale(q.shape[2]),
        softcap=context.softcap,
        layout=context.layout,
        implementation="mosaic",
    )


def sequences_of(rows: RaggedRows, positions: Array) -> tuple[Array, Sequences]:
    """(the pages of all sequences, the sequences) of tokens at `positions` [T].

    Those that decode come first, then the prompts, and then padding, as a sequence that sees no
    key.
    """
    num, num_pages = rows.block_table.shape
    number = jnp.arange(num, dtype=jnp.int32)
    is_single = (rows.segments[:num] == 0) & (positions[:num] >= 0)
    prompt = jnp.arange(1, len(rows.first_pages), dtype=jnp.int32)
    is_own = rows.segments == prompt[:, None]
    first = is_own.argmax(1).astype(jnp.int32)
    num_known = (positions >= 0).sum(dtype=jnp.int32)
    parts = (
        (number, first, num_known),
        (is_single.astype(jnp.int32), is_own.sum(1, dtype=jnp.int32), len(positions) - num_known),
        (positions[:num], positions[first], jnp.int32(-len(positions))),
        (number * num_pages, num * num_pages + rows.first_pages[1:], jnp.int32(0)),
    )
    listed = jnp.concatenate([rows.block_table.reshape(-1), rows.prompt_pages])
    return listed, Sequences(*(jnp.concatenate([a, b, c[None]]) for a, b, c in parts))


def over_table(
    q: Array,
    context: AttentionContext,
    cache: PagedCache,
    rows: RaggedRows,
    *,
    family: str,
    is_invariant: bool,
) -> Array:
    """As the reference over a table; 0 for padding and for tokens of prompts."""
    (k, k_scales), (v, v_scales) = pages.parts(cache.k), pages.parts(cache.v)
    return kernel.paged_attention(
        q[: len(rows.block_table)],
        k,
        v,
        rows.block_table,
        *_single_intervals(context, rows),
        None if k_scales is None else (k_scales, v_scales),
        scale=context.logits_scale(q.shape[2]),
        softcap=context.softcap,
        layout=context.layout,
        is_invariant=is_invariant,
        implementation=family,
    )


def over_prompts(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    rows: RaggedRows,
    *,
    family: str,
    is_invariant: bool,
) -> Array:
    """Attention of q [1, T, N, H] over the pages [C, S of a page, K, H] of its prompts.

    0 for tokens of no prompt.
    """
    low, high = key_intervals(context, rows, k.shape[1])
    k, v = (pages.reshape(1, -1, *pages.shape[2:]) for pages in (k, v))
    o, _ = attention(
        q,
        k,
        v,
        low[None],
        high[None],
        scale=context.logits_scale(q.shape[3]),
        softcap=context.softcap,
        is_invariant=is_invariant,
        implementation=family,
    )
    return o


def key_intervals(
    context: AttentionContext,
    rows: RaggedRows,
    page_size: int,
) -> tuple[Array, Array]:
    """The slots of the listed pages that each token of a prompt sees: low <= s < high, [T] each."""
    first = rows.first_pages[rows.segments] * page_size
    end = context.positions[0] + 1
    low = jnp.zeros_like(end) if context.window is None else jnp.maximum(end - context.window, 0)
    # A token of no prompt sees nothing.
    return first + low, jnp.where(rows.segments > 0, first + end, 0)
