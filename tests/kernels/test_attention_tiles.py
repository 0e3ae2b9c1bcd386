"""Which tiles of queries and keys the attention kernels visit, and in which order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.attention.scheduler import CACHE, item_at, longest_first
from jaxscale.kernels.attention.tiles import (
    BlockLayout,
    key_tiles,
    key_visits,
    query_tiles,
    query_visits,
)
from tests.kernels.test_attention import intervals


@pytest.mark.parametrize("kind", ["causal", "window", "documents"])
def test_tiles_are_those_that_are_seen(kind):
    low, high = intervals(kind, 320, 320, 2)
    queries, keys = 64, 32
    number = np.arange(320)
    sees = (number >= low[..., None]) & (number < high[..., None])
    blocks = sees.reshape(len(low), 320 // queries, queries, 320 // keys, keys)
    is_some, is_whole = blocks.any((2, 4)), blocks.all((2, 4))
    settings = dict(queries=queries, keys=keys)
    by_queries = np.asarray(key_tiles(jnp.asarray(low), jnp.asarray(high), **settings))
    by_keys = np.asarray(query_tiles(jnp.asarray(low), jnp.asarray(high), **settings, num_keys=320))
    turned = is_some.swapaxes(1, 2), is_whole.swapaxes(1, 2)
    for table, some, whole in ((by_queries, is_some, is_whole), (by_keys, *turned)):
        tile = np.arange(some.shape[2])
        first, end, whole_first, whole_end = np.moveaxis(table, -1, 0)[..., None]
        visited = (first <= tile) & (tile < end)
        assert (visited >= some).all()
        assert visited.sum() == some.sum(), "nothing is visited for nothing"
        is_tested = visited & ~((whole_first <= tile) & (tile < whole_end))
        assert (is_tested >= (some & ~whole)).all(), "a tile of which a part is hidden"
        if kind != "documents":  # where whole tiles may lie on both sides of another
            assert is_tested.sum() == (some & ~whole).sum(), "nothing is tested for nothing"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["one mask", "documents", "patterns"])
def test_every_tile_of_every_head_is_taken_once_longest_first(kind, batch):
    """Of as many heads at a time as the cache holds, 3 of 8 here."""
    rng, tiles, heads, together = np.random.default_rng(0), 64, 4, 3
    lengths = rng.integers(0, 90, ({"one mask": 1, "documents": batch, "patterns": 2}[kind], tiles))
    first = rng.integers(0, 9, lengths.shape)
    order = longest_first(
        jnp.stack([first, first + lengths, first, first], -1), 2 if kind == "patterns" else 0
    )
    number = np.arange(tiles * batch * heads)
    take = jax.vmap(lambda i: jnp.stack(item_at(order, i, batch, heads, CACHE // together)))
    b, head, row, tile = np.asarray(take(number)).T
    taken = list(zip(b.tolist(), head.tolist(), tile.tolist(), strict=True))
    assert sorted(taken) == list(itertools.product(range(batch), range(heads), range(tiles)))
    np.testing.assert_array_equal(row, b if kind == "documents" else 0)
    visits = (lengths.sum(0, keepdims=True) if kind == "patterns" else lengths)[row, tile]
    for start in range(0, batch * heads, together):
        now = slice(start * tiles, (start + together) * tiles)
        assert set((b * heads + head)[now].tolist()) == set(
            range(start, min(start + together, batch * heads))
        )
        for each in range(batch):
            assert (np.diff(visits[now][b[now] == each]) <= 0).all()


def test_visited_blocks_are_those_of_phi_3_small():
    """64-token blocks, 16 local ones, every eighth, one further for each head; whole ones first."""
    layout, num_blocks = BlockLayout(), 40
    i, j = np.ogrid[:num_blocks, :num_blocks]
    visits = (
        *((False, n, key_visits(layout, 40, 40, n)) for n in (1, 2)),
        *((True, n, query_visits(layout, 40, 40, n)) for n in (1, 2)),
    )
    for pattern in (0, 3, 7):
        wanted = (j <= i) & ((i - j < 16) | ((j + pattern + 1) % 8 == 0))
        for is_by_keys, size, (table, entries) in visits:
            sees = wanted.T if is_by_keys else wanted
            for tile in range(num_blocks // size):
                own = range(size * tile, size * (tile + 1))
                first, end, whole_first, whole_end = table[pattern, tile]
                assert (first, whole_first) == (0, 0)
                found = {
                    e >> 2: tuple(e >> b & 1 for b in range(size))
                    for e in entries[pattern, tile, :end].tolist()
                }
                assert found == {
                    b: tuple(sees[own, b].tolist())
                    for b in np.flatnonzero(sees[own].any(0)).tolist()
                }
                for entry in entries[pattern, tile, :whole_end]:
                    assert sees[own, entry >> 2].all()
                    assert entry >> 2 not in own, "tokens of its own block are hidden in part"
