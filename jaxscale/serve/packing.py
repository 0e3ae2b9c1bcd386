"""The static shapes of steps, and one array that tells a step all it needs to know."""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.ops.attention.paged_cache import RaggedRows
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
    "top_p_rest": ("float32", 0),
    "min_p": ("float32", 0),
    "seed": ("uint32", 0),
    "index": ("int32", 0),
    "repetition": ("float32", 1),
    "presence": ("float32", 0),
    "frequency": ("float32", 0),
}


@dataclasses.dataclass(frozen=True)
class RowShape:
    """What a compiled draw depends on.

    Args:
        num_rows: R, sequences.
        num_slots: rows of the device's state.
    """

    num_rows: int
    num_slots: int

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """The end of the packed array: what is known of each sequence."""
        rows = (self.num_rows,)
        settings = {name: Field(rows, *setting) for name, setting in SETTINGS.items()}
        return settings | {
            # A sequence that draws nothing keeps its row, whose result goes nowhere.
            "slot": Field(rows, "int32", self.num_slots),
            "slot_drawn": Field(rows, "int32", self.num_slots),
            "position": Field(rows, "int32", 0),
            "target": Field(rows, "int32", -1),
        }

    @property
    def num_words(self) -> int:
        """Of all these fields."""
        return len(self.fields) * self.num_rows


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What a compiled step depends on; letters as `ops.attention.paged_cache.RaggedRows`.

    Args:
        num_tokens: T.
        num_single: D, sequences of one token each.
        num_pages: P, pages of each of them.
        num_prompts: further sequences.
        num_prompt_pages: C, pages of all of these together.
        num_extra: tokens beside the last of each sequence behind which logits are wanted.
        num_slots: rows of the device's state.
        block_size: tokens a page.
    """

    num_tokens: int
    num_single: int
    num_pages: int
    num_prompts: int
    num_prompt_pages: int
    num_extra: int
    num_slots: int
    block_size: int

    @property
    def rows(self) -> RowShape:
        """Of all sequences."""
        num_rows = self.num_single + self.num_prompts + self.num_extra
        return RowShape(num_rows, self.num_slots)

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """The fields of the packed array, in their order."""
        tokens, pages = (self.num_tokens,), (self.num_prompt_pages,)
        filled = {
            "tokens": Field(tokens, "int32", 0),
            "positions": Field(tokens, "int32", -1),
            "slot_mapping": Field(tokens, "int32", 0),
            "block_table": Field((self.num_single, self.num_pages), "int32", 0),
            "ends": Field((self.num_single,), "int32", 0),
            "lengths": Field(tokens, "int32", 0),
            "segments": Field(tokens, "int32", 0),
            "adapters": Field(tokens, "int32", 0),
            "prompt_pages": Field(pages, "int32", 0),
            "page_segments": Field(pages, "int32", 0),
            "first_pages": Field((self.num_prompts + 1,), "int32", 0),
            "last_place": Field((self.rows.num_rows,), "int32", 0),
        }
        return filled | self.rows.fields


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


def unpack(shape: StepShape | RowShape, packed: Array) -> dict[str, Array]:
    """The fields of a packed array on the device."""
    fields, start = {}, 0
    for name, field in shape.fields.items():
        end = start + math.prod(field.shape)
        words = packed[start:end].reshape(field.shape)
        fields[name] = lax.bitcast_convert_type(words, jnp.dtype(field.dtype))
        start = end
    return fields


def after(
    shape: StepShape,
    fields: dict[str, Array],
    num_steps: Array,
) -> dict[str, Array]:
    """The fields of a step of single tokens as they are `num_steps` [] int32 steps later.

    A sequence stands still from its end on.
    """
    positions = fields["positions"] + num_steps
    is_token = (fields["positions"] >= 0) & (positions < fields["ends"])
    positions = jnp.where(is_token, positions, -1)
    number, place = positions // shape.block_size, positions % shape.block_size
    pages = jnp.take_along_axis(fields["block_table"], number[:, None], 1)[:, 0]
    return fields | {
        # The device knows them.
        "tokens": jnp.where(num_steps > 0, -1, fields["tokens"]),
        "positions": positions,
        "slot_mapping": jnp.where(is_token, pages * shape.block_size + place, 0),
        "lengths": fields["lengths"] + num_steps,
        "slot_drawn": jnp.where(is_token, fields["slot_drawn"], shape.num_slots),
        "position": fields["position"] + num_steps,
    }


def ragged_rows(fields: dict[str, Any]) -> RaggedRows:
    """What attention needs of the fields."""
    return RaggedRows(**{name: fields[name] for name in _names(RaggedRows)})


def draw_rows(fields: dict[str, Any]) -> DrawRows:
    """How each sequence draws."""
    return DrawRows(**{name: fields[name] for name in _names(DrawRows)})


def penalty_rows(fields: dict[str, Any]) -> PenaltyRows:
    """The penalties of each sequence."""
    return PenaltyRows(**{name: fields[name] for name in _names(PenaltyRows)})


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that steps are rounded up to, each ascending.

    Args:
        singles: sequences of one token, in a step without prompts.
        mixed_singles: the same beside prompts.
        tokens: tokens of a step with prompts.
        pages: pages of a sequence of one token.
        prompt_pages: pages of the prompts of a step together.
        extra: tokens beside the last of each sequence behind which logits are wanted; the first
            is 0.
        warm_extra: up to which of these steps are compiled ahead.
        max_prompts: prompts a step.
        num_slots: rows of the device's state.
        block_size: tokens a page.
    """

    singles: tuple[int, ...]
    mixed_singles: tuple[int, ...]
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    prompt_pages: tuple[int, ...]
    extra: tuple[int, ...]
    warm_extra: int
    max_prompts: int
    num_slots: int
    block_size: int

    def shape(
        self,
        *,
        num_single: int,
        num_pages: int,
        num_tokens: int,
        num_prompt_pages: int,
        num_extra: int = 0,
    ) -> StepShape:
        """The smallest shape that holds a step.

        Args:
            num_single: sequences of one token.
            num_pages: most pages of one of them.
            num_tokens: of all sequences.
            num_prompt_pages: of the other sequences together; 0 where there is none.
            num_extra: tokens beside the last of each of these behind which logits are wanted.
        """
        pages = _round_up(num_pages, self.pages)
        if not num_prompt_pages:
            return self._without_prompts(_round_up(num_single, self.singles), pages)
        return self._with_prompts(
            _round_up(num_single, self.mixed_singles),
            pages,
            _round_up(num_tokens, self.tokens),
            _round_up(num_prompt_pages, self.prompt_pages),
            _round_up(num_extra, self.extra),
        )

    def all_shapes(self) -> list[StepShape]:
        """Every shape that `shape` may return, but for more than `warm_extra`."""
        found = itertools.starmap(
            self._without_prompts, itertools.product(self.singles, self.pages)
        )
        extra = [num for num in self.extra if num <= self.warm_extra]
        mixed = (self.mixed_singles, self.pages, self.tokens, self.prompt_pages, extra)
        found_mixed = itertools.starmap(self._with_prompts, itertools.product(*mixed))
        return list(dict.fromkeys([*found, *found_mixed]))

    def _without_prompts(self, num_single: int, num_pages: int) -> StepShape:
        return StepShape(
            num_tokens=num_single,
            num_single=num_single,
            num_pages=num_pages,
            num_prompts=0,
            num_prompt_pages=0,
            num_extra=0,
            num_slots=self.num_slots,
            block_size=self.block_size,
        )

    def _with_prompts(
        self,
        num_single: int,
        num_pages: int,
        num_tokens: int,
        num_prompt_pages: int,
        num_extra: int,
    ) -> StepShape:
        return StepShape(
            num_tokens=max(num_tokens, num_single),
            num_single=num_single,
            num_pages=num_pages,
            num_prompts=self.max_prompts,
            num_prompt_pages=num_prompt_pages,
            num_extra=num_extra,
            num_slots=self.num_slots,
            block_size=self.block_size,
        )


def powers_up_to(largest: int, *, smallest: int = 1, factor: float = 2) -> tuple[int, ...]:
    """smallest, smallest * factor, ... below `largest`, and `largest`.

    A factor that is no integer makes multiples of 64, which matmuls divide into tiles.
    """
    sizes, size = [], smallest
    while size < largest:
        sizes.append(size if isinstance(factor, int) else -(-round(size) // 64) * 64)
        size *= factor
    return (*sizes, largest)


def _round_up(size: int, sizes: tuple[int, ...]) -> int:
    return next(each for each in sizes if each >= size)
