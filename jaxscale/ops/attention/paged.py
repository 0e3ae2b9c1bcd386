"""The paged key-value cache, and attention of a flat row of tokens of many sequences over it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxscale.ops.attention.cache import over_keys
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.types import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer in pages that any sequence may hold.

    Args:
        k: [pages, S of a page, K, H]. Slots before heads: what a token writes lies together.
        v: as `k`.
    """

    k: Array
    v: Array


def empty_pages(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
) -> PagedCache:
    """Pages that hold nothing yet."""
    shape = num_pages, page_size, num_kv_heads, head_dim
    return PagedCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["slot_mapping", "block_table", "tile_rows", "tile_tokens", "places"],
    meta_fields=["num_single"],
)
@dataclasses.dataclass(frozen=True)
class RaggedRows:
    """Which tokens of a flat row belong to which sequence.

    The first D tokens are one each of D sequences. Those behind them come in tiles of Q tokens of
    one sequence, so that the queries of a tile read the same keys.

    Args:
        slot_mapping: [T] int32, the slot of the cache that each token writes: page * page size +
            place in the page. Padding writes to a page that nobody reads.
        block_table: [R, P] int32, the pages of each sequence in order; the first D sequences are
            those of the first D tokens.
        tile_rows: [M] int32, the sequence of each tile.
        tile_tokens: [M, Q] int32, the tokens of each tile; T where there is none.
        places: [T] int32, where the output of each token lies: i < D among the first tokens,
            D + m * Q + q in the tiles.
        num_single: D.
    """

    slot_mapping: Array
    block_table: Array
    tile_rows: Array
    tile_tokens: Array
    places: Array
    num_single: int


def attend(
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    cache: PagedCache,
    *,
    rows: RaggedRows,
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
    Returns:
        ([1, T, N, H], the cache with the new tokens).
    """
    cache = PagedCache(
        k=_written(cache.k, k[0], rows.slot_mapping),
        v=_written(cache.v, v[0], rows.slot_mapping),
    )
    q, positions = q[0], context.positions[0]
    num = rows.num_single
    outputs = []
    if num:
        table = rows.block_table[:num]
        outputs += _over_pages(q[:num, None], positions[:num, None], table, cache, context)
    if len(rows.tile_rows):
        tiles = rows.tile_tokens
        q_tiles = q.at[tiles].get(mode="fill", fill_value=0)
        positions_of_tiles = positions.at[tiles].get(mode="fill", fill_value=-1)
        table = rows.block_table[rows.tile_rows]
        outputs += _over_pages(q_tiles, positions_of_tiles, table, cache, context)
        return jnp.concatenate(outputs)[rows.places][None], cache
    return outputs[0][None], cache


def _written(pages: Array, x: Array, slot_mapping: Array) -> Array:
    """Pages with x [T, K, H] in its slots; in place where the pages are donated."""
    slots = pages.reshape(-1, *pages.shape[2:])
    return slots.at[slot_mapping].set(x.astype(pages.dtype)).reshape(pages.shape)


def _over_pages(
    q: Array,
    positions: Array,
    block_table: Array,
    cache: PagedCache,
    context: AttentionContext,
) -> list[Array]:
    """Attention of q [M, Q, N, H] over the pages of M sequences: [[M * Q, N, H]]."""
    slots = jnp.arange(block_table.shape[1] * cache.k.shape[1], dtype=jnp.int32)
    own = dataclasses.replace(
        context,
        positions=positions,
        key_positions=jnp.broadcast_to(slots, (len(q), len(slots))),
    )

    def gathered(pages: Array) -> Array:
        found = pages[block_table]  # [M, P, S of a page, K, H]
        rows = found.reshape(len(q), len(slots), *found.shape[3:])
        return jnp.moveaxis(rows, 1, 2)

    o = over_keys(q, gathered(cache.k), gathered(cache.v), own)
    return [o.reshape(-1, *o.shape[2:])]
