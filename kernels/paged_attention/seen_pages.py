"""Which pages the queries of a kv head see, counted without a list.

Under a layout of blocks a page is a block. A kv head's G queries have G patterns that follow one
another, so that the columns of blocks that any of them sees are runs of G at the layout's stride.

Source: Abdin et al. 2024, Phi-3 (arXiv 2404.14219), section 2, as `attention.tiles.BlockLayout`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout


@dataclasses.dataclass(frozen=True)
class SeenPages:
    """Pages of a sequence from `first` to `end`, of which a layout hides some before `local`.

    Without a layout they are all seen, and nothing here costs a kernel anything.

    Args:
        layout: of the blocks; None for none.
        groups: query heads that read one kv head.
        head: the kv head.
        first, end: the pages of which a query sees a key by its position.
        local: the first page that is local to a query; `first` without a layout.
        skipped: how many of those that are seen are left out at the beginning.
    """

    layout: BlockLayout | None
    groups: int
    head: Any
    first: Any
    local: Any
    end: Any
    skipped: Any = 0

    @classmethod
    def of(
        cls,
        layout: BlockLayout | None,
        groups: int,
        head: Any,
        pages: tuple[Any, Any],
        position: Any,
    ) -> "SeenPages":
        """For (first, end) of the pages, and the position of the first query."""
        first, end = pages
        local = first
        if layout is not None:
            local = jnp.maximum(lax.div(position, BLOCK) - (layout.local - 1), first)
        return cls(layout, groups, head, first, local, end)

    def after(self, number: Any) -> "SeenPages":
        """Without the first `number` that are seen."""
        if self.layout is None:
            return dataclasses.replace(self, first=self.first + number)
        return dataclasses.replace(self, skipped=self.skipped + number)

    @property
    def count(self) -> Any:
        """How many are seen."""
        return self.place(self.end)

    def place(self, page: Any) -> Any:
        """How many are seen before a page from `local` on."""
        if self.layout is None:
            return page - self.first
        return page - self.local + self._columns - self.skipped

    def page(self, place: Any) -> Any:
        """The page before which `place` are seen."""
        if self.layout is None:
            return self.first + place
        place = jnp.maximum(place + self.skipped, 0)
        rank = self._rank(self.first) + place
        turn, rest = lax.div(rank, self._width), lax.rem(rank, self._width)
        column = turn * self.layout.stride + rest - self._shift
        is_column = place < self._columns
        return jnp.where(is_column, column, self.local + place - self._columns)

    def is_seen(self, group: Array, position: Any, page: Any) -> Array:
        """Whether the kv head's `group`-th query, which stands at `position`, sees a page."""
        turn = lax.rem(group + (page + self.head * self.groups + 1), self.layout.stride)
        return (page > lax.div(position, BLOCK) - self.layout.local) | (turn == 0)

    @property
    def _width(self) -> int:
        return min(self.groups, self.layout.stride)

    @property
    def _shift(self) -> Any:
        """What makes the columns that are seen the first `width` of each stride."""
        return lax.rem((self.head + 1) * self.groups, self.layout.stride)

    @property
    def _columns(self) -> Any:
        """How many are seen before `local`."""
        return self._rank(self.local) - self._rank(self.first)

    def _rank(self, page: Any) -> Any:
        """How many columns are seen before a page, counted from -shift on."""
        place, stride = page + self._shift, self.layout.stride
        rest = jnp.minimum(lax.rem(place, stride), self._width)
        return lax.div(place, stride) * self._width + rest
