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
    num_tokens = batch * length
    num_tiles = -(-num_tokens // num_rows)
    padding = num_tiles * num_rows - num_tokens

    def split(x: Array) -> Array:
        shape = x.shape[2:]
        flat = x.reshape(num_tokens, *shape)
        filled = jnp.concatenate([flat, jnp.zeros((padding, *shape), x.dtype)])
        return filled.reshape(num_tiles, 1, num_rows, *shape)

    def join(x: Array) -> Array:
        shape = x.shape[3:]
        flat = x.reshape(num_tiles * num_rows, *shape)
        return flat[:num_tokens].reshape(batch, length, *shape)

    def one(tile: Any) -> Any:
        # Nothing outside is fused with a tile, and no conversion is left out at its borders.
        tile = lax.optimization_barrier(tile)
        return lax.optimization_barrier(f(tile))

    tiles = jax.tree.map(split, arrays)
    return jax.tree.map(join, lax.map(one, tiles))


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
    num_groups = len(matrices)
    num_tiles = -(-len(rows) // num_rows) + num_groups
    num_places = num_tiles * num_rows
    # Each group begins with a tile of its own.
    sizes = -(-group_sizes // num_rows)
    ends = jnp.cumsum(group_sizes)
    tile_ends = jnp.cumsum(sizes)
    first_row = ends - group_sizes
    first_place = (tile_ends - sizes) * num_rows
    row = jnp.arange(len(rows))
    group = _group_of(row, ends)
    place = first_place[group] + row - first_row[group]
    place = jnp.where(row < ends[-1], place, num_places)
    padded = jnp.zeros((num_places, rows.shape[1]), rows.dtype)
    padded = padded.at[place].set(rows, mode="drop")

    def one(tile: tuple[Array, Array]) -> Array:
        rows, group = tile
        matrix = lax.dynamic_index_in_dim(matrices, group, 0, keepdims=False)
        rows, matrix = lax.optimization_barrier((rows, matrix))
        product = jnp.einsum("nd,df->nf", rows, matrix)
        return lax.optimization_barrier(product)

    by_tile = padded.reshape(num_tiles, num_rows, -1)
    group_of_tile = _group_of(jnp.arange(num_tiles), tile_ends)
    outputs = lax.map(one, (by_tile, group_of_tile))
    outputs = outputs.reshape(num_places, -1)
    return outputs.at[place].get(mode="fill", fill_value=0)


def _group_of(number: Array, ends: Array) -> Array:
    """The group in which each number lies, whose first numbers behind are `ends`."""
    group = jnp.searchsorted(ends, number, side="right")
    return jnp.minimum(group, len(ends) - 1)
