"""The static shapes of steps, and one array that tells a step all it needs to know."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.ops.attention.paged import RaggedRows
from jaxscale.serve.drawing import DrawRows, PenaltyRows
from jaxscale.types import Array


class Field(NamedTuple):
    """A field of the packed array: its shape, its type of 32 bits, and what padding holds."""

    shape: tuple[int, ...]
    dtype: str
    filling: int


# How a sequence draws: types, and values that change nothing and cost nothing.
SETTINGS = {
    "temperature": ("float32", 0),
    "top_k": ("int32", np.iinfo(np.int32).max),
    "top_p": ("float32", 1),
    "min_p": ("float32", 0),
    "seed": ("uint32", 0),
    "index": ("int32", 0),
    "repetition": ("float32", 1),
    "presence": ("float32", 0),
    "frequency": ("float32", 0),
}


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What a compiled step depends on; letters as `ops.attention.paged.RaggedRows`.

    Args:
        num_tokens: T.
        num_single: D, sequences of one token each.
        num_prompts: further sequences.
        num_tiles: M.
        tile_size: Q.
        num_pages: P, pages a sequence.
        num_slots: rows of the device's state.
    """

    num_tokens: int
    num_single: int
    num_prompts: int
    num_tiles: int
    tile_size: int
    num_pages: int
    num_slots: int

    @property
    def num_rows(self) -> int:
        """R, all sequences."""
        return self.num_single + self.num_prompts

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """The fields of the packed array, in their order."""
        tokens, rows, tiles = (self.num_tokens,), (self.num_rows,), (self.num_tiles,)
        filled = {
            "tokens": Field(tokens, "int32", 0),
            "positions": Field(tokens, "int32", -1),
            "slot_mapping": Field(tokens, "int32", 0),
            "places": Field(tokens, "int32", 0),
            "tile_rows": Field(tiles, "int32", 0),
            "tile_tokens": Field((*tiles, self.tile_size), "int32", self.num_tokens),
            "block_table": Field((*rows, self.num_pages), "int32", 0),
            "last_place": Field(rows, "int32", 0),
            "slot": Field(rows, "int32", self.num_slots),
            # A sequence that draws nothing keeps its row, whose result goes nowhere.
            "slot_drawn": Field(rows, "int32", self.num_slots),
            "position": Field(rows, "int32", 0),
        }
        return filled | {
            name: Field(rows, dtype, filling) for name, (dtype, filling) in SETTINGS.items()
        }


def empty(shape: StepShape) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(a packed array of padding [words] int32, its fields as views to be filled in)."""
    sizes = {name: math.prod(field.shape) for name, field in shape.fields.items()}
    packed, views, start = np.empty(sum(sizes.values()), np.int32), {}, 0
    for name, field in shape.fields.items():
        end = start + sizes[name]
        views[name] = packed[start:end].view(field.dtype).reshape(field.shape)
        views[name][...] = field.filling
        start = end
    return packed, views


def unpack(shape: StepShape, packed: Array) -> dict[str, Array]:
    """The fields of a packed array on the device."""
    fields, start = {}, 0
    for name, field in shape.fields.items():
        end = start + math.prod(field.shape)
        words = packed[start:end].reshape(field.shape)
        fields[name] = lax.bitcast_convert_type(words, jnp.dtype(field.dtype))
        start = end
    return fields


def ragged_rows(shape: StepShape, fields: dict[str, Any]) -> RaggedRows:
    """What attention needs of the fields."""
    names = ("slot_mapping", "block_table", "tile_rows", "tile_tokens", "places")
    return RaggedRows(**{name: fields[name] for name in names}, num_single=shape.num_single)


def draw_rows(fields: dict[str, Any]) -> DrawRows:
    """How each sequence draws."""
    return DrawRows(**{field.name: fields[field.name] for field in dataclasses.fields(DrawRows)})


def penalty_rows(fields: dict[str, Any]) -> PenaltyRows:
    """The penalties of each sequence."""
    names = (field.name for field in dataclasses.fields(PenaltyRows))
    return PenaltyRows(**{name: fields[name] for name in names})


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that steps are rounded up to, each ascending.

    Args:
        singles: sequences of one token, in a step without prompts.
        mixed_singles: the same beside prompts.
        tokens: tokens of a step with prompts.
        pages: pages a sequence.
        tile_size: tokens of a tile.
        max_prompts: prompts a step.
        num_slots: rows of the device's state.
    """

    singles: tuple[int, ...]
    mixed_singles: tuple[int, ...]
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    tile_size: int
    max_prompts: int
    num_slots: int

    def shape(
        self,
        *,
        num_tokens: int,
        num_single: int,
        num_pages: int,
    ) -> StepShape:
        """The smallest shape that holds a step; without prompts all its tokens are single."""
        pages = _round_up(num_pages, self.pages)
        if num_tokens == num_single:
            return self._without_prompts(_round_up(num_single, self.singles), pages)
        single = _round_up(num_single, self.mixed_singles)
        return self._with_prompts(_round_up(num_tokens, self.tokens), single, pages)

    def all_shapes(self) -> list[StepShape]:
        """Every shape that `shape` may return, the smallest first."""
        found = [
            self._without_prompts(single, pages) for pages in self.pages for single in self.singles
        ]
        found += (
            self._with_prompts(tokens, single, pages)
            for pages in self.pages
            for tokens in self.tokens
            for single in self.mixed_singles
        )
        return list(dict.fromkeys(found))

    def _without_prompts(self, num_single: int, num_pages: int) -> StepShape:
        return self._make(num_single, num_single, 0, 0, num_pages)

    def _with_prompts(
        self,
        num_tokens: int,
        num_single: int,
        num_pages: int,
    ) -> StepShape:
        num_tokens = max(num_tokens, num_single)
        num_tiles = -(-num_tokens // self.tile_size) + self.max_prompts
        return self._make(num_tokens, num_single, self.max_prompts, num_tiles, num_pages)

    def _make(
        self,
        num_tokens: int,
        num_single: int,
        num_prompts: int,
        num_tiles: int,
        num_pages: int,
    ) -> StepShape:
        return StepShape(
            num_tokens=num_tokens,
            num_single=num_single,
            num_prompts=num_prompts,
            num_tiles=num_tiles,
            tile_size=self.tile_size,
            num_pages=num_pages,
            num_slots=self.num_slots,
        )


def powers_up_to(largest: int, *, smallest: int = 1, factor: int = 2) -> tuple[int, ...]:
    """smallest, smallest * factor, ... below `largest`, and `largest`."""
    sizes, size = [], smallest
    while size < largest:
        sizes.append(size)
        size *= factor
    return (*sizes, largest)


def _round_up(size: int, sizes: tuple[int, ...]) -> int:
    return next(each for each in sizes if each >= size)
