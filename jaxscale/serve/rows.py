"""The host's side of a step: the settings and pages of each slot, and the array made of them."""

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as List
from typing import Any

import numpy as np

from jaxscale.serve import packing
from jaxscale.serve.packing import Buckets, StepShape
from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.sequences import Piece, Sequence


class HostRows:
    """The settings and pages of each slot, from which steps take the rows that they run."""

    def __init__(self, buckets: Buckets, num_tokens: int):
        self.num_tokens = num_tokens
        self.block_table = np.zeros((buckets.num_slots, buckets.pages[-1]), np.int32)
        self.num_blocks = [0] * buckets.num_slots
        self.adapters = np.zeros(buckets.num_slots, np.int32)
        self.settings = {
            name: np.zeros(buckets.num_slots, dtype)
            for name, (dtype, _) in packing.SETTINGS.items()
        }

    def write(
        self,
        slot: int,
        config: RequestConfig,
        index: int,
        adapter: int,
    ) -> None:
        """Takes the settings of a sequence that has just been given the slot."""
        sampling = config.sampling
        values = dataclasses.asdict(sampling) | dataclasses.asdict(config.penalties)
        # A client may send any number, of which the device takes 32 bits.
        values |= {"index": index, "top_k": min(sampling.top_k or self.num_tokens, self.num_tokens)}
        values["top_p_rest"] = 1 - sampling.top_p
        for name, array in self.settings.items():
            array[slot] = values[name]
        self.num_blocks[slot] = 0
        self.adapters[slot] = adapter

    def update(self, sequence: Sequence) -> None:
        """Takes the blocks that a sequence has been given since."""
        num_known, blocks = self.num_blocks[sequence.slot], sequence.blocks
        if num_known != len(blocks):
            self.block_table[sequence.slot, num_known : len(blocks)] = blocks[num_known:]
            self.num_blocks[sequence.slot] = len(blocks)


class Writer:
    """Fills in a packed array."""

    def __init__(
        self,
        views: dict[str, np.ndarray],
        rows: HostRows,
        block_size: int,
        shape: StepShape,
    ):
        self._views = views
        self._rows = rows
        self._block_size = block_size
        self._shape = shape
        self._num_tokens = 0
        self._num_pages = 0  # of prompts
        self._num_rows = shape.num_single + shape.num_prompts  # those of extra tokens come last

    def add_single(self, pieces: List[Piece]) -> None:
        """Sequences of one token, the first ones."""
        slots = self._add_rows(0, pieces)
        pages = self._rows.block_table[slots, : self._shape.num_pages]
        positions = _integers(piece.start for piece in pieces)
        here, place = slice(len(pieces)), np.arange(len(pieces))
        tokens = _integers(_token_at(piece.sequence, piece.start) for piece in pieces)
        views = self._views
        views["tokens"][here] = tokens
        views["positions"][here] = positions
        views["slot_mapping"][here] = self._slots_of(slots, positions)
        views["last_place"][here] = place
        views["ends"][here] = _integers(piece.start + piece.num_steps for piece in pieces)
        views["lengths"][here] = _integers(piece.length for piece in pieces)
        views["adapters"][here] = self._rows.adapters[slots]
        views["block_table"][here] = pages
        self._num_tokens = len(pieces)

    def add_prompts(self, pieces: List[Piece]) -> None:
        """Sequences of several tokens, behind them; a few of these may have a row for each."""
        slots = self._add_rows(self._shape.num_single, pieces)
        for segment, (piece, slot) in enumerate(zip(pieces, slots, strict=True), 1):
            self._add_prompt(piece, slot, segment)
            if piece.num_extra:
                self._add_extra(piece, slot)

    def _add_prompt(
        self,
        piece: Piece,
        slot: int,
        segment: int,
    ) -> None:
        views, count = self._views, piece.count
        start, end = piece.start, piece.start + count
        here = slice(self._num_tokens, self._num_tokens + count)
        positions = np.arange(start, end, dtype=np.int32)
        views["tokens"][here] = piece.tokens()
        views["positions"][here] = positions
        views["slot_mapping"][here] = self._slots_of(slot, positions)
        views["segments"][here] = segment
        views["adapters"][here] = self._rows.adapters[slot]
        views["lengths"][here] = piece.length
        row = self._shape.num_single + segment - 1
        views["last_place"][row] = here.stop - 1
        num_pages = -(-end // self._block_size)
        pages = slice(self._num_pages, self._num_pages + num_pages)
        views["prompt_pages"][pages] = self._rows.block_table[slot, :num_pages]
        views["page_segments"][pages] = segment
        views["first_pages"][segment] = pages.start
        self._num_tokens, self._num_pages = here.stop, pages.stop

    def _add_extra(self, piece: Piece, slot: int) -> None:
        """Rows for all tokens but the last of a piece that has just been added."""
        views, num = self._views, piece.num_extra
        here = slice(self._num_rows, self._num_rows + num)
        views["last_place"][here] = np.arange(self._num_tokens - num - 1, self._num_tokens - 1)
        views["slot"][here] = slot
        views["position"][here] = np.arange(piece.start + 1, piece.start + num + 1)
        for name, array in self._rows.settings.items():
            views[name][here] = array[slot]
        if piece.is_scored:
            views["target"][here] = piece.sequence.prompt[piece.start + 1 : piece.start + num + 1]
        self._num_rows += num

    def _add_rows(self, first: int, pieces: List[Piece]) -> np.ndarray:
        """Settings and pages of the rows from `first` on; the pieces' slots."""
        for piece in pieces:
            self._rows.update(piece.sequence)
        slots = _integers(piece.sequence.slot for piece in pieces)
        ends = _integers(piece.start + piece.count for piece in pieces)
        is_drawing = _integers(piece.is_drawing for piece in pieces)
        views, shape = self._views, self._shape
        here = slice(first, first + len(pieces))
        views["slot"][here] = slots
        views["slot_drawn"][here] = np.where(is_drawing, slots, shape.num_slots)
        views["position"][here] = ends
        for name, array in self._rows.settings.items():
            views[name][here] = array[slots]
        for row, piece in enumerate(pieces, first):
            if piece.is_scored and not piece.is_drawing:
                views["target"][row] = piece.sequence.prompt[piece.start + piece.count]
        return slots

    def _slots_of(self, slots: Any, positions: np.ndarray) -> np.ndarray:
        """The places in the cache of the tokens at `positions` of the sequences in `slots`."""
        blocks = self._rows.block_table[slots, positions // self._block_size]
        return blocks * self._block_size + positions % self._block_size


def _integers(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int32)


def _token_at(sequence: Sequence, position: int) -> int:
    """A token of a sequence; -1 for one that only the device knows yet."""
    in_output = position - len(sequence.prompt)
    if in_output < 0:
        return sequence.prompt[position]
    return sequence.outputs[in_output] if in_output < len(sequence.outputs) else -1
