"""Which keys each query sees, as intervals or as blocks, and which tiles are visited for that."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxscale.kernels.checks import require

BLOCK = 64  # tokens in a block of a block-sparse layout


def key_tiles(
    low: Array,
    high: Array,
    *,
    queries: int,
    keys: int,
) -> Array:
    """The tiles of keys that each tile of queries visits.

    Args:
        low, high: [B, T] int32: query t sees the keys low <= s < high, none where high <= low.
            T % queries == 0.
        queries, keys: sizes of the tiles.
    Returns:
        [B, T / queries, 4] int32: first and end of the tiles that any of the queries sees, then
        first and end of those among them of which every query sees every key.
    """
    rows = low.shape[0]
    low = low.reshape(rows, -1, queries)
    high = high.reshape(rows, -1, queries)
    sees = high > low
    # A query that sees nothing must not widen the range, so its interval counts as [max, 0).
    never = jnp.iinfo(jnp.int32).max
    least_low = jnp.where(sees, low, never).min(-1)
    first = least_low // keys
    most_high = jnp.where(sees, high, 0).max(-1)
    end = _ceil_divide(most_high, keys)
    first = jnp.minimum(first, end)
    whole_first = _ceil_divide(low.max(-1), keys)
    whole_first = jnp.clip(whole_first, first, end)
    least_high = jnp.where(sees, high, 0).min(-1)
    whole_end = jnp.clip(least_high // keys, whole_first, end)
    table = jnp.stack([first, end, whole_first, whole_end], -1)
    return table.astype(jnp.int32)


def query_tiles(
    low: Array,
    high: Array,
    *,
    queries: int,
    keys: int,
    num_keys: int,
) -> Array:
    """The tiles of queries that see each tile of keys.

    Args:
        low, high, queries, keys: as for `key_tiles`.
        num_keys: S.
    Returns:
        [B, ceil(num_keys / keys), 4] int32: first and end of the tiles of queries of which any sees
        the tile of keys, then first and end of a run among them that all see it whole.
    """
    table = key_tiles(low, high, queries=queries, keys=keys)
    first, end, whole_first, whole_end = jnp.moveaxis(table, -1, 0)
    query_tile = jnp.arange(first.shape[1])
    num_tiles = query_tile.size
    key_tile = jnp.arange(_ceil_divide(num_keys, keys))[:, None]

    def first_of(is_in: Array) -> Array:
        return jnp.where(is_in, query_tile, num_tiles).min(-1)

    def end_of(is_in: Array) -> Array:
        return jnp.where(is_in, query_tile + 1, 0).max(-1)

    def sees_between(first: Array, end: Array) -> Array:
        """[B, tiles of keys, tiles of queries]."""
        return (first[:, None] <= key_tile) & (key_tile < end[:, None])

    sees = sees_between(first, end)
    sees_whole = sees_between(whole_first, whole_end)
    begin = first_of(sees)
    finish = end_of(sees)
    whole_begin = first_of(sees_whole)
    # The run ends with the first tile after its begin that does not see all keys.
    is_break = (query_tile > whole_begin[..., None]) & ~sees_whole
    whole_finish = first_of(is_break)
    begin = jnp.minimum(begin, finish)
    whole_begin = jnp.clip(whole_begin, begin, finish)
    whole_finish = jnp.clip(whole_finish, whole_begin, finish)
    runs = jnp.stack([begin, finish, whole_begin, whole_finish], -1)
    return runs.astype(jnp.int32)


def _ceil_divide(x, size: int):
    return -(-x // size)


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """Which blocks of BLOCK keys a block of queries sees under a causal mask.

    It sees its own block and those just before it, and columns of blocks at a stride. Head n sees
    block j from block i >= j where i - j < local, or where stride divides j + n + 1.

    Source: Abdin et al. 2024, Phi-3 (arXiv 2404.14219), section 2, and the released Phi-3-small,
        which has blocks of 64, 16 local ones and a stride of 8.
    Args:
        local: number of local blocks, the query's own among them.
        stride: distance of the columns; also the number of patterns over the heads.
    Raises:
        ValueError: one of them is below 1.
    """

    local: int = 16
    stride: int = 8

    def __post_init__(self):
        is_positive = self.local >= 1 and self.stride >= 1
        given = f"local {self.local} and stride {self.stride}"
        require(is_positive, "BlockLayout", given, "1 or more of both")

    def sees(self, num_blocks: int) -> np.ndarray:
        """[stride, blocks of queries, blocks of keys] bool; head n has pattern n % stride."""
        pattern = np.arange(self.stride)[:, None, None]
        i = np.arange(num_blocks)[:, None]
        j = np.arange(num_blocks)
        is_local = i - j < self.local
        is_column = (j + pattern + 1) % self.stride == 0
        return (j <= i) & (is_local | is_column)


def visits(
    pairs: np.ndarray,
    is_whole: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The blocks that each tile of one or two blocks visits.

    Those come first whose every token all tokens of the tile see.

    Args:
        pairs: [patterns, tiles, blocks, 1 or 2] bool: whether each block of the tile sees, or is
            seen by, a block.
        is_whole: [patterns, tiles, blocks] bool.
    Returns:
        (table [patterns, tiles, 4] as that of `key_tiles`, but of places in the list; the list
        [patterns, tiles, most visits], whose entries are 4 times the block plus 1 for the tile's
        first and 2 for its second block).
    """
    tile = pairs.shape[-1]
    bits = np.array([1, 2])[:tile]
    flags = pairs @ bits
    is_visited = flags > 0
    rank = np.where(is_visited, 1, 2)
    rank = np.where(is_whole, 0, rank)
    order = np.argsort(rank, axis=-1, kind="stable")
    entries = 4 * order + np.take_along_axis(flags, order, -1)
    count = is_visited.sum(-1)
    num_whole = is_whole.sum(-1)
    zero = np.zeros_like(count)
    table = np.stack([zero, count, zero, num_whole], -1)
    entries = entries[..., : count.max()]
    return table.astype(np.int32), entries.astype(np.int32)


def _seen_blocks(
    layout: BlockLayout,
    num_queries: int,
    num_keys: int,
) -> np.ndarray:
    """[patterns, blocks of queries, blocks of keys] bool."""
    sees = layout.sees(max(num_queries, num_keys))
    return sees[:, :num_queries, :num_keys]


def key_visits(
    layout: BlockLayout,
    num_queries: int,
    num_keys: int,
    tile: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The blocks of keys that each tile of `tile` blocks of queries, 1 or 2, visits.

    Lengths are in blocks; that of the queries is a multiple of `tile`.
    """
    num_tiles = num_queries // tile
    sees = _seen_blocks(layout, num_queries, num_keys)
    by_tile = sees.reshape(layout.stride, num_tiles, tile, num_keys)
    pairs = by_tile.swapaxes(2, 3)
    first_block = tile * np.arange(num_tiles)[:, None]
    is_past = np.arange(num_keys) < first_block
    return visits(pairs, pairs.all(-1) & is_past)


def query_visits(
    layout: BlockLayout,
    num_queries: int,
    num_keys: int,
    tile: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The blocks of queries that each tile of `tile` blocks of keys, 1 or 2, visits.

    Lengths are in blocks; that of the keys is a multiple of `tile`.
    """
    num_tiles = num_keys // tile
    sees = _seen_blocks(layout, num_queries, num_keys)
    by_tile = sees.reshape(layout.stride, num_queries, num_tiles, tile)
    pairs = by_tile.swapaxes(1, 2)
    end_block = tile * (np.arange(num_tiles)[:, None] + 1)
    is_later = np.arange(num_queries) >= end_block
    return visits(pairs, pairs.all(-1) & is_later)
