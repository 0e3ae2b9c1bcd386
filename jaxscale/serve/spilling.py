"""Pages whose content waits in the host's memory until a prefix asks for it."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxscale.serve.blocks import PADDING_BLOCK, Move
from jaxscale.types import Array


class HostPages:
    """The host's places, and the way there and back.

    Nothing waits for the device but a page that comes back in the step in which it went: what went
    is taken in when the next pages move.
    """

    def __init__(self):
        self._contents: dict[int, Any] = {}
        self._on_way: list[tuple[list[int], Any]] = []

    def move(self, caches: Any, moves: Sequence[Move]) -> Any:
        """The caches after moves in their order; those that are given may be donated."""
        if moves:
            self._take_in()
        for is_spill, group in itertools.groupby(moves, lambda move: move.is_spill):
            if is_spill:
                self._spill(caches, list(group))
            else:
                caches = self._load(caches, list(group))
        return caches

    def clear(self) -> None:
        """Forgets everything."""
        self._contents.clear()
        self._on_way.clear()

    def _spill(self, caches: Any, moves: list[Move]) -> None:
        gathered = _gathered(caches, _padded([move.block for move in moves]))
        for leaf in jax.tree.leaves(gathered):
            leaf.copy_to_host_async()
        self._on_way.append(([move.place for move in moves], gathered))

    def _take_in(self) -> None:
        for places, gathered in self._on_way:
            contents = jax.tree.map(np.asarray, gathered)
            for row, place in enumerate(places):
                # A copy, for the rows of one array may stay for different times.
                page = jax.tree.map(lambda leaf: leaf[row].copy(), contents)  # noqa: B023
                self._contents[place] = page
        self._on_way.clear()

    def _load(self, caches: Any, moves: list[Move]) -> Any:
        self._take_in()
        blocks = _padded([move.block for move in moves])
        pages = [self._contents[move.place] for move in moves]
        pages += [pages[0]] * (len(blocks) - len(pages))
        contents = jax.tree.map(lambda *leaves: np.stack(leaves), *pages)
        leaves, structure = jax.tree.flatten(caches)
        new = jax.tree.leaves(contents)
        put = _put_to(tuple(leaf.sharding for leaf in leaves))
        leaves = put(leaves, blocks, new)
        return jax.tree.unflatten(structure, leaves)


def _padded(blocks: list[int]) -> np.ndarray:
    """Block numbers, filled up to a power of two, so that few sizes are compiled."""
    size = 1 << (len(blocks) - 1).bit_length()
    return np.asarray(blocks + [PADDING_BLOCK] * (size - len(blocks)), np.int32)


@jax.jit
def _gathered(caches: Any, blocks: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[blocks], caches)


@functools.cache
def _put_to(shardings: tuple[Any, ...]) -> Any:
    """(leaves of caches, blocks, contents) -> the leaves, on the devices that have them."""

    def put(
        leaves: list[Array],
        blocks: Array,
        contents: list[Array],
    ) -> tuple[Array, ...]:
        pairs = zip(leaves, contents, strict=True)
        return tuple(leaf.at[blocks].set(content) for leaf, content in pairs)

    return jax.jit(put, donate_argnums=0, out_shardings=shardings)
