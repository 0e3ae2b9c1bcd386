"""The paged key-value cache, and attention of a flat row of tokens of many sequences over it."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.attention.api import attention
from jaxscale.kernels.attention.api import refusal as attention_refusal
from jaxscale.kernels.paged_attention import api as single_kernel
from jaxscale.ops.attention import invariant, pages
from jaxscale.ops.attention.cache import over_keys
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.ops.attention.pages import Pages
from jaxscale.ops.device import kernel_family
from jaxscale.types import Array, InputError, check_choice

logger = logging.getLogger(__name__)

FAMILIES = ("mosaic", "triton")
BACKENDS = ("reference", *FAMILIES, "invariant")
QUERY_CHUNK = 256  # queries of prompts whose logits exist at a time in the reference


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer in pages that any sequence may hold.

    Args:
        k: [pages, S of a page, K, H]. Slots before heads: what a token writes lies together.
        v: as `k`.
    """

    k: Pages
    v: Pages


def empty_pages(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
) -> PagedCache:
    """Pages that hold nothing yet, in the compute type or one of `pages.LARGEST`."""
    shape = num_pages, page_size, num_kv_heads, head_dim
    return PagedCache(pages.empty(shape, dtype), pages.empty(shape, dtype))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "slot_mapping",
        "block_table",
        "segments",
        "prompt_pages",
        "page_segments",
        "first_pages",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RaggedRows:
    """Which tokens of a flat row belong to which sequence.

    The first tokens are one each of decoding sequences, at most D. Those behind them are pieces of
    prompts. The pages of all prompts, from each one's first page to that of its last token here,
    are listed one prompt after the other, and read once for all of its tokens.

    Args:
        slot_mapping: [T] int32, the slot of the cache that each token writes: page * page size +
            place in the page. Padding writes to a page that nobody reads.
        block_table: [D, P] int32, the pages of each decoding sequence in order.
        segments: [T] int32, the prompt of a token, counted from 1; 0 for a token of a decoding
            sequence and for padding.
        prompt_pages: [C] int32, the pages of all prompts; none in a step without prompts.
        page_segments: [C] int32, the prompt that each of them is of; 0 for padding.
        first_pages: [prompts + 1] int32, where in `prompt_pages` a prompt begins; the first is not
            used.
    """

    slot_mapping: Array
    block_table: Array
    segments: Array
    prompt_pages: Array
    page_segments: Array
    first_pages: Array


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
        implementation: one of BACKENDS; None picks one and logs it.
    Returns:
        ([1, T, N, H], the cache with the new tokens).
    Raises:
        InputError: the named backend cannot do what is asked.
    """
    cache = PagedCache(
        k=pages.written(cache.k, k[0], rows.slot_mapping),
        v=pages.written(cache.v, v[0], rows.slot_mapping),
    )
    if implementation is None:
        implementation = _choose(q, context, cache)
    check_choice("implementation", implementation, BACKENDS)
    if implementation in FAMILIES and (reason := _refusal(implementation, q, context, cache)):
        raise InputError("implementation", implementation, reason)
    is_invariant = implementation == "invariant"
    if is_invariant:
        if not invariant.has_kernels(*q.shape[2:3], *cache.k.shape[2:], q.dtype):
            return _invariant(q[0], context, cache, rows)[None], cache
        implementation = "mosaic"
    over_table, over_prompts = _reference_over_table, _reference_over_prompts
    if implementation in FAMILIES:
        over_table, over_prompts = (
            functools.partial(f, family=implementation, is_invariant=is_invariant)
            for f in (_kernel_over_table, _kernel_over_prompts)
        )
    single = over_table(q[0], context, cache, rows)
    if not len(rows.prompt_pages):
        return single[None], cache
    num = len(single)
    k, v = (pages.read(each, rows.prompt_pages, q.dtype) for each in (cache.k, cache.v))
    of_prompts = over_prompts(q, k, v, context, rows)
    is_prompt = (rows.segments[:num] > 0)[:, None, None]
    first = jnp.where(is_prompt, of_prompts[0, :num], single)
    return jnp.concatenate([first, of_prompts[0, num:]])[None], cache


def _choose(q: Array, context: AttentionContext, cache: PagedCache) -> str:
    family = kernel_family()
    is_fast = family in FAMILIES and _refusal(family, q, context, cache) is None
    chosen = family if is_fast else "reference"
    logger.info("paged attention: backend %s for %s", chosen, q.dtype)
    return chosen


def _refusal(
    family: str,
    q: Array,
    context: AttentionContext,
    cache: PagedCache,
) -> str | None:
    """What the kernels would need, as the text of an error; None when they can."""
    if context.layout is not None:
        return "a backend for a layout of blocks"
    values, _ = pages.parts(cache.k)
    return single_kernel.refusal(family, q[0], values) or attention_refusal(family, q, q)


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


def _kernel_over_table(
    q: Array,
    context: AttentionContext,
    cache: PagedCache,
    rows: RaggedRows,
    *,
    family: str,
    is_invariant: bool,
) -> Array:
    """As `_reference_over_table`; 0 for padding and for tokens of prompts."""
    num = len(rows.block_table)
    is_single = rows.segments[:num] == 0
    high = jnp.where(is_single, context.positions[0, :num] + 1, 0)
    low = jnp.zeros_like(high) if context.window is None else jnp.maximum(high - context.window, 0)
    (k, k_scales), (v, v_scales) = pages.parts(cache.k), pages.parts(cache.v)
    return single_kernel.paged_attention(
        q[:num],
        k,
        v,
        rows.block_table,
        low,
        high,
        None if k_scales is None else (k_scales, v_scales),
        scale=context.logits_scale(q.shape[2]),
        softcap=context.softcap,
        is_invariant=is_invariant,
        implementation=family,
    )


def _kernel_over_prompts(
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


def _reference_over_prompts(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    rows: RaggedRows,
) -> Array:
    """As `_kernel_over_prompts`, with the logits of QUERY_CHUNK queries at a time."""
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
