"""Who sees whom, as an interval of keys for each query or by blocks, and the tiles that are visited for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.kernels.checks import require

BLOCK = 64  # tokens, of a block-sparse layout


def key_tiles(low: jax.Array, high: jax.Array, *, queries: int, keys: int) -> jax.Array:
    """The tiles of keys that each tile of queries visits.

    Args:
        low, high: [B, T] int32: query t sees the keys low <= s < high, none where high <= low; T %
            queries == 0.
        queries, keys: the tiles' sizes.
    Returns:
        [B, T / queries, 4] int32: first and end of the tiles that any of the queries sees, and
        first and end of those among them that all see whole.
    """
    low, high = (x.reshape(x.shape[0], -1, queries) for x in (low, high))
    sees = high > low
    first = jnp.where(sees, low, jnp.iinfo(jnp.int32).max).min(-1) // keys
    end = -(-jnp.where(sees, high, 0).max(-1) // keys)
    first = jnp.minimum(first, end)
    whole_first = jnp.clip(-(-low.max(-1) // keys), first, end)
    whole_end = jnp.clip(jnp.where(sees, high, 0).min(-1) // keys, whole_first, end)
    return jnp.stack([first, end, whole_first, whole_end], -1).astype(jnp.int32)


def query_tiles(
    low: jax.Array, high: jax.Array, *, queries: int, keys: int, num_keys: int
) -> jax.Array:
    """The tiles of queries that see each tile of keys; arguments as `key_tiles`, and the number of keys.

    Returns:
        [B, ceil(num_keys / keys), 4] int32: first and end of the tiles of queries of which any sees
        the tile of keys, and first and end of a run among them that all see it whole.
    """
    first, end, whole_first, whole_end = jnp.moveaxis(
        key_tiles(low, high, queries=queries, keys=keys), -1, 0
    )
    number = jnp.arange(first.shape[1])
    tile = jnp.arange(-(-num_keys // keys))[:, None]

    def extent(is_in: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(is_in, number, number.size).min(-1), jnp.where(is_in, number + 1, 0).max(
            -1
        )

    sees = (first[:, None] <= tile) & (tile < end[:, None])
    sees_whole = (whole_first[:, None] <= tile) & (tile < whole_end[:, None])
    begin, finish = extent(sees)
    whole_begin, _ = extent(sees_whole)
    broken = (number > whole_begin[..., None]) & ~sees_whole
    whole_finish = jnp.where(broken, number, number.size).min(-1)
    begin = jnp.minimum(begin, finish)
    whole_begin = jnp.clip(whole_begin, begin, finish)
    whole_finish = jnp.clip(whole_finish, whole_begin, finish)
    return jnp.stack([begin, finish, whole_begin, whole_finish], -1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """Which blocks of BLOCK keys a block of queries sees under a causal mask: its own and those before it, and columns.

    Head n sees block j from block i >= j where i - j < local, or where stride divides j + n + 1.

    Source: Abdin et al. 2024, Phi-3 (arXiv 2404.14219), section 2, and the released Phi-3-small:
        64, 16 and 8.
    Args:
        local: blocks, the query's own among them.
        stride: of the columns; also how many patterns there are over the heads.
    Raises:
        ValueError: one of them is below 1.
    """

    local: int = 16
    stride: int = 8

    def __post_init__(self):
        given = f"local {self.local} and stride {self.stride}"
        require(self.local >= 1 and self.stride >= 1, "BlockLayout", given, "1 or more of both")

    def sees(self, num_blocks: int) -> np.ndarray:
        """[stride, blocks of queries, blocks of keys] bool; head n has pattern n % stride."""
        pattern, i, j = np.ogrid[: self.stride, :num_blocks, :num_blocks]
        return (j <= i) & ((i - j < self.local) | ((j + pattern + 1) % self.stride == 0))


def visits(pairs: np.ndarray, is_whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The blocks that each tile of one or two blocks visits, those first whose every token all tokens of the tile see.

    Args:
        pairs: [patterns, tiles, blocks, 1 or 2] bool, whether each block of the tile has to do with
            a block.
        is_whole: [patterns, tiles, blocks] bool.
    Returns:
        [patterns, tiles, 4] as in `key_tiles`, of places in the list; the list [patterns, tiles,
        most], 4 times the block plus 1 for the tile's first and 2 for its second block.
    """
    flags = pairs @ np.array([1, 2])[: pairs.shape[-1]]
    order = np.argsort(np.where(is_whole, 0, np.where(flags > 0, 1, 2)), axis=-1, kind="stable")
    count, num_whole = (flags > 0).sum(-1), is_whole.sum(-1)
    entries = 4 * order + np.take_along_axis(flags, order, -1)
    zero = np.zeros_like(count)
    table = np.stack([zero, count, zero, num_whole], -1)
    return table.astype(np.int32), entries[..., : count.max()].astype(np.int32)


def key_visits(
    layout: BlockLayout, num_queries: int, num_keys: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of tiles of two blocks of queries, the blocks of keys; lengths in blocks, the queries' even."""
    sees = layout.sees(max(num_queries, num_keys))[:, :num_queries, :num_keys]
    pairs = sees.reshape(layout.stride, num_queries // 2, 2, num_keys).swapaxes(2, 3)
    is_past = np.arange(num_keys) < 2 * np.arange(num_queries // 2)[:, None]
    return visits(pairs, pairs.all(-1) & is_past)


def query_visits(
    layout: BlockLayout, num_queries: int, num_keys: int, tile: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of tiles of so many blocks of keys, 1 or 2, the blocks of queries; lengths in blocks, the keys' whole tiles."""
    sees = layout.sees(max(num_queries, num_keys))[:, :num_queries, :num_keys]
    pairs = sees.reshape(layout.stride, num_queries, num_keys // tile, tile).swapaxes(1, 2)
    is_later = np.arange(num_queries) >= tile * (np.arange(num_keys // tile)[:, None] + 1)
    return visits(pairs, pairs.all(-1) & is_later)
