"""Which tiles of rows cover the groups."""

import jax.numpy as jnp
from jax import Array


def row_tiles(
    group_sizes: Array,
    num_rows: int,
    *,
    tile: int,
    alignment: int,
) -> Array:
    """The tiles of rows that cover every group and the rows past the last.

    A tile begins at a multiple of `alignment`, so the first tile of a group may begin with rows of
    the group before it.

    Returns:
        [4, tiles] int32: group (the number of groups for the rows past the last), first row, and
        begin and end, within the tile, of the group's rows. The range is empty in the tiles that
        are left over at the end.
    """
    past_last = num_rows - group_sizes.sum(keepdims=True)
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
