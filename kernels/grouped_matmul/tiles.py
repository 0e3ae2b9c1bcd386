"""Which tiles of rows cover the groups."""

import jax.numpy as jnp
from jax import Array


def row_tiles(
    group_sizes: Array,
    num_rows: int,
    *,
    tile: int,
    alignment: int,
    needs_tail: bool = True,
) -> Array:
    """The tiles of rows that cover every group and the rows past the last.

    A tile begins at a multiple of `alignment`, so the first tile of a group may begin with rows of
    the group before it.

    Args:
        group_sizes: [E].
        num_rows: of all groups and past them.
        tile: rows of a tile.
        alignment: as above.
        needs_tail: whether all rows past the last group are covered; else at most one tile is.
    Returns:
        [4, tiles] int32: group (the number of groups for the rows past the last), first row, and
        begin and end, within the tile, of the group's rows. The range is empty in the tiles that
        are left over at the end.
    """
    used = group_sizes.sum(keepdims=True)
    past_last = num_rows - used
    if not needs_tail:
        past_last = jnp.minimum(past_last, tile - used % alignment)
    sizes = jnp.concatenate([group_sizes, past_last]).astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    aligned = starts - starts % alignment
    num_tiles = jnp.where(sizes > 0, -(-(ends - aligned) // tile), 0)
    tile_ends = jnp.cumsum(num_tiles)
    # As many tiles as any division of the rows into groups needs.
    number = jnp.arange(num_rows // tile + 2 * sizes.size)
    group = jnp.minimum((number[:, None] >= tile_ends).sum(1), sizes.size - 1)
    first_of_group = aligned[group]
    number_in_group = number - (tile_ends - num_tiles)[group]
    first = first_of_group + number_in_group * tile
    begin = jnp.clip(starts[group] - first, 0, tile)
    end = jnp.clip(ends[group] - first, 0, tile)
    return jnp.stack([group, first, begin, end]).astype(jnp.int32)
