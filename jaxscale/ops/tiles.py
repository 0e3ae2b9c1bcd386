"""Functions of single tokens, computed in tiles of a fixed number of them.

A matmul sums in an order that depends on its shape, so that a token's result depends in its last
bits on how many others are beside it. In tiles of one shape it depends on the token alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.types import Array


def over_tiles(f: Callable, arrays: Any, num_rows: int) -> Any:
    """f of tokens [1, num_rows, ...] at a time; the last tile is filled up with zeros.

    Args:
        f: arrays of a tile -> a tree of [1, num_rows, ...]. Of each token it returns what depends
            on that token alone.
        arrays: a tree of [B, T, ...].
        num_rows: of a tile.
    Returns:
        A tree of [B, T, ...].
    Cost: the tiles run one after the other.
    """
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    num_tiles = -(-batch * length // num_rows)

    def split(x: Array) -> Array:
        flat = x.reshape(batch * length, *x.shape[2:])
        margins = [(0, num_tiles * num_rows - len(flat)), *((0, 0) for _ in x.shape[2:])]
        return jnp.pad(flat, margins).reshape(num_tiles, 1, num_rows, *x.shape[2:])

    def join(x: Array) -> Array:
        flat = x.reshape(num_tiles * num_rows, *x.shape[3:])
        return flat[: batch * length].reshape(batch, length, *x.shape[3:])

    def one(tile: Any) -> Any:
        # Nothing outside is fused with a tile, and no conversion is left out at its borders.
        return lax.optimization_barrier(f(lax.optimization_barrier(tile)))

    return jax.tree.map(join, lax.map(one, jax.tree.map(split, arrays)))


def grouped_matmul(
    rows: Array,
    matrices: Array,
    group_sizes: Array,
    num_rows: int,
) -> Array:
    """The product of consecutive rows with the matrix of their group, in tiles of one group each.

    Args:
        rows: [n, D], sorted by group.
        matrices: [E, D, F].
        group_sizes: [E] int32.
        num_rows: of a tile.
    Returns:
        [n, F]; 0 past the last group.
    Cost: 2 D F (n + E num_rows) FLOPs at most.
    """
    num, num_groups = len(rows), len(matrices)
    num_tiles = -(-num // num_rows) + num_groups
    ends = jnp.cumsum(group_sizes)
    group = jnp.searchsorted(ends, jnp.arange(num), side="right")
    is_in_group = group < num_groups
    group = jnp.minimum(group, num_groups - 1)
    # Each group begins with a tile of its own.
    tile_ends = jnp.cumsum(-(-group_sizes // num_rows))
    first_row = ends - group_sizes
    first_place = (tile_ends - -(-group_sizes // num_rows)) * num_rows
    place = first_place[group] + jnp.arange(num) - first_row[group]
    place = jnp.where(is_in_group, place, num_tiles * num_rows)
    padded = jnp.zeros((num_tiles * num_rows, rows.shape[1]), rows.dtype)
    padded = padded.at[place].set(rows, mode="drop")
    group_of_tile = jnp.searchsorted(tile_ends, jnp.arange(num_tiles), side="right")
    group_of_tile = jnp.minimum(group_of_tile, num_groups - 1)

    def one(tile: tuple[Array, Array]) -> Array:
        rows, group = tile
        matrix = lax.dynamic_index_in_dim(matrices, group, 0, keepdims=False)
        operands = lax.optimization_barrier((rows, matrix))
        return lax.optimization_barrier(jnp.einsum("nd,df->nf", *operands))

    by_tile = padded.reshape(num_tiles, num_rows, -1)
    outputs = lax.map(one, (by_tile, group_of_tile)).reshape(num_tiles * num_rows, -1)
    return outputs.at[place].get(mode="fill", fill_value=0)
