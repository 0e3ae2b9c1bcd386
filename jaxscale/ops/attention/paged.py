"""Attention of a flat row of tokens of many sequences over a paged key-value cache."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.attention.api import refusal as attention_refusal
from jaxscale.kernels.paged_attention import api as kernel
from jaxscale.ops.attention import invariant, pages
from jaxscale.ops.attention import paged_kernels as kernels
from jaxscale.ops.attention.cache import over_keys
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.ops.attention.paged_cache import PagedCache, RaggedRows
from jaxscale.ops.attention.paged_kernels import FAMILIES
from jaxscale.ops.attention.pages import Pages
from jaxscale.ops.device import kernel_family
from jaxscale.types import Array, InputError, check_choice

logger = logging.getLogger(__name__)

# "ragged" is Mosaic's kernel for prompts and decoding sequences in one launch.
BACKENDS = ("reference", *FAMILIES, "ragged", "invariant")
QUERY_CHUNK = 256  # queries of prompts whose logits exist at a time in the reference


def attend(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    cache: PagedCache,
    *,
    rows: RaggedRows,
    implementation: str | None = None,
) -> tuple[Array, PagedCache]:
    """Writes the new keys to the cache, and attends over the pages of each token's sequence.

    A key's position is its place in its sequence's pages, so that what stands behind the new
    tokens in a page is never seen.

    Source: Kwon et al. 2023, PagedAttention (arXiv 2309.06180), section 4.1.
    Args:
        q: [1, T, N, H] queries of the new tokens.
        k: [1, T, K, H] their keys.
        v: [1, T, K, H] their values.
        context: positions of the new tokens [1, T], negative for padding, without segments; the
            layer's window, soft-cap, scale and layout; causal.
        cache: of the tokens before.
        rows: what belongs together.
        implementation: one of BACKENDS; None picks one and logs it. Under a layout "mosaic" and
            "triton" compute single tokens alone, and prompts are the reference's, which is logged.
    Returns:
        ([1, T, N, H], the cache with the new tokens).
    Raises:
        InputError: the named backend cannot do what is asked.
    """
    has_prompts = len(rows.prompt_pages) > 0
    if implementation is None:
        implementation = _choose(q, context, cache, has_prompts=has_prompts)
    check_choice("implementation", implementation, BACKENDS)
    if reason := _refusal(implementation, q, context, cache):
        raise InputError("implementation", implementation, reason)
    is_invariant = implementation == "invariant"
    if kernels.writes_itself(implementation, q, cache, rows):
        o, cache = kernels.over_few(q[0], (k[0], v[0]), context, cache, rows)
        return o[None], cache
    cache = PagedCache(*pages.written((cache.k, cache.v), (k[0], v[0]), rows.slot_mapping))
    if implementation == "ragged":
        return kernels.over_all(q[0], context, cache, rows)[None], cache
    if is_invariant:
        if not invariant.has_kernels(*q.shape[2:3], *cache.k.shape[2:], q.dtype):
            return _invariant(q[0], context, cache, rows)[None], cache
        implementation = "mosaic"
    over_table, over_prompts = _reference_over_table, _reference_over_prompts
    if implementation in FAMILIES:
        settings = dict(family=implementation, is_invariant=is_invariant)
        over_table = functools.partial(kernels.over_table, **settings)
        if context.layout is None:
            over_prompts = functools.partial(kernels.over_prompts, **settings)
        elif has_prompts:
            logger.info("paged attention: prompts under a layout of blocks: backend reference")
    single = over_table(q[0], context, cache, rows)
    if not has_prompts:
        return single[None], cache
    num = len(single)
    k, v = (pages.read(each, rows.prompt_pages, q.dtype) for each in (cache.k, cache.v))
    of_prompts = over_prompts(q, k, v, context, rows)
    is_prompt = (rows.segments[:num] > 0)[:, None, None]
    first = jnp.where(is_prompt, of_prompts[0, :num], single)
    return jnp.concatenate([first, of_prompts[0, num:]])[None], cache


def _choose(
    q: Array,
    context: AttentionContext,
    cache: PagedCache,
    *,
    has_prompts: bool,
) -> str:
    family = kernel_family()
    candidates = [family] if family in FAMILIES else []
    # Of pages of 8 bits each tile of a prompt would convert its keys again; under a layout the
    # reference is what else there is for prompts.
    is_wide = not isinstance(cache.k, pages.QuantisedPages)
    if family == "mosaic" and has_prompts and (is_wide or context.layout):
        candidates.insert(0, "ragged")
    can = [each for each in candidates if _refusal(each, q, context, cache) is None]
    chosen = can[0] if can else "reference"
    logger.info("paged attention: backend %s for %s", chosen, q.dtype)
    if context.layout:
        what = "all blocks and hides some" if chosen == "reference" else "the blocks that heads see"
        logger.info("paged attention: under a layout of blocks it reads %s", what)
    return chosen


def _refusal(
    implementation: str,
    q: Array,
    context: AttentionContext,
    cache: PagedCache,
) -> str | None:
    """What a kernel would need, as the text of an error; None when it can, and for no kernel."""
    if implementation == "invariant" and context.layout is not None:
        return "a backend for a layout of blocks"
    if implementation not in (*FAMILIES, "ragged"):
        return None
    values, _ = pages.parts(cache.k)
    if implementation == "ragged":
        return kernel.ragged_refusal("mosaic", q[0], values, context.layout)
    refusal = kernel.refusal(implementation, q[0], values, context.layout)
    return refusal or attention_refusal(implementation, q, q)


def _invariant(
    q: Array,
    context: AttentionContext,
    cache: PagedCache,
    rows: RaggedRows,
) -> Array:
    """Attention of all tokens [T, N, H], see `ops.attention.invariant`."""
    num, num_pages = rows.block_table.shape
    # Decoding sequences are numbered behind the prompts.
    numbers = len(rows.first_pages) + jnp.arange(num)
    own = jnp.full_like(rows.segments, -1).at[:num].set(numbers)
    segments = jnp.where(rows.segments > 0, rows.segments, own)
    places = jnp.arange(len(rows.prompt_pages)) - rows.first_pages[rows.page_segments]
    places = jnp.concatenate([jnp.tile(jnp.arange(num_pages), num), places])
    of_prompts = jnp.where(rows.page_segments > 0, rows.page_segments, -2)
    page_segments = jnp.concatenate([jnp.repeat(numbers, num_pages), of_prompts])
    listed = jnp.concatenate([rows.block_table.reshape(-1), rows.prompt_pages])
    size = pages.page_size(cache.k)
    keys = invariant.KeyBlocks(
        k=pages.read(cache.k, listed, q.dtype),
        v=pages.read(cache.v, listed, q.dtype),
        positions=places[:, None] * size + jnp.arange(size),
        segments=jnp.repeat(page_segments[:, None], size, 1),
    )
    return invariant.over_blocks(q, context.positions[0], segments, keys, context)


def _reference_over_table(
    q: Array,
    context: AttentionContext,
    cache: PagedCache,
    rows: RaggedRows,
) -> Array:
    """Attention of the first D tokens of q [T, N, H], each over its sequence's pages: [D, N, H]."""
    num, num_pages = rows.block_table.shape
    slots = jnp.arange(num_pages * pages.page_size(cache.k), dtype=jnp.int32)
    own = dataclasses.replace(
        context,
        positions=context.positions[0, :num, None],
        key_positions=jnp.broadcast_to(slots, (num, len(slots))),
    )

    def gathered(kept: Pages) -> Array:
        found = pages.read(kept, rows.block_table, q.dtype)  # [D, P, S of a page, K, H]
        return jnp.moveaxis(found.reshape(num, len(slots), *found.shape[3:]), 1, 2)

    return over_keys(q[:num, None], gathered(cache.k), gathered(cache.v), own)[:, 0]


def _reference_over_prompts(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    rows: RaggedRows,
) -> Array:
    """As `kernels.over_prompts`, with the logits of QUERY_CHUNK queries at a time."""
    num_pages, page_size = k.shape[:2]
    numbers = jnp.arange(num_pages) - rows.first_pages[rows.page_segments]
    places = numbers[:, None] * page_size + jnp.arange(page_size)
    keyed = dataclasses.replace(
        context,
        key_positions=places.reshape(1, -1),
        key_segments=jnp.repeat(rows.page_segments, page_size)[None],
    )
    # The pages of padding have the segment 0, and nobody sees them.
    segments = jnp.where(rows.segments > 0, rows.segments, -1)
    k, v = (jnp.moveaxis(pages.reshape(1, -1, *pages.shape[2:]), 1, 2) for pages in (k, v))

    def of_chunk(chunk: tuple[Array, Array, Array]) -> Array:
        q, positions, segments = chunk
        own = dataclasses.replace(keyed, positions=positions[None], segments=segments[None])
        return over_keys(q[None], k, v, own)[0]

    chunks, length = (q[0], context.positions[0], segments), q.shape[1]
    if length % QUERY_CHUNK:
        return of_chunk(chunks)[None]
    split = jax.tree.map(lambda x: x.reshape(-1, QUERY_CHUNK, *x.shape[1:]), chunks)
    return lax.map(of_chunk, split).reshape(q.shape)
