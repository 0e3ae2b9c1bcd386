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
        self.settings = {
            name: np.zeros(buckets.num_slots, dtype)
            for name, (dtype, _) in packing.SETTINGS.items()
        }

    def write(self, slot: int, config: RequestConfig, index: int) -> None:
        """Takes the settings of a sequence that has just been given the slot."""
        sampling = config.sampling
        values = dataclasses.asdict(sampling) | dataclasses.asdict(config.penalties)
        values |= {"index": index, "top_k": sampling.top_k or self.num_tokens}
        for name, array in self.settings.items():
            array[slot] = values[name]
        self.num_blocks[slot] = 0

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
        self._num_tiles = 0

    def add_single(self, pieces: List[Piece]) -> None:
        """Sequences of one token, the first ones."""
        slots = self._add_rows(0, pieces)
        positions = _integers(piece.start for piece in pieces)
        here, place = slice(len(pieces)), np.arange(len(pieces))
        tokens = _integers(_token_at(piece.sequence, piece.start) for piece in pieces)
        views = self._views
        views["tokens"][here] = tokens
        views["positions"][here] = positions
        views["slot_mapping"][here] = self._slots_of(slots, positions)
        views["places"][here] = place
        views["last_place"][here] = place
        self._num_tokens = len(pieces)

    def add_prompts(self, pieces: List[Piece]) -> None:
        """Sequences of several tokens, behind them."""
        first = self._shape.num_single
        slots = self._add_rows(first, pieces)
        for number, (piece, slot) in enumerate(zip(pieces, slots, strict=True)):
            self._add_prompt(piece, slot, first + number)

    def _add_prompt(
        self,
        piece: Piece,
        slot: int,
        row: int,
    ) -> None:
        views, size = self._views, self._shape.tile_size
        start, count = self._num_tokens, piece.count
        here = slice(start, start + count)
        positions = piece.start + np.arange(count, dtype=np.int32)
        views["tokens"][here] = piece.sequence.known()[piece.start : piece.start + count]
        views["positions"][here] = positions
        views["slot_mapping"][here] = self._slots_of(slot, positions)
        views["last_place"][row] = start + count - 1
        num_tiles = -(-count // size)
        tiles = slice(self._num_tiles, self._num_tiles + num_tiles)
        views["tile_rows"][tiles] = row
        in_tiles = views["tile_tokens"][tiles].reshape(-1)  # a view, for they lie together
        in_tiles[:count] = np.arange(start, start + count)
        before = self._shape.num_single + self._num_tiles * size
        views["places"][here] = before + np.arange(count)
        self._num_tokens += count
        self._num_tiles += num_tiles

    def _add_rows(self, first: int, pieces: List[Piece]) -> np.ndarray:
        """Settings and pages of the rows from `first` on; the pieces' slots."""
        for piece in pieces:
            self._rows.update(piece.sequence)
        slots = _integers(piece.sequence.slot for piece in pieces)
        ends = _integers(piece.start + piece.count for piece in pieces)
        is_drawing = _integers(piece.is_drawing for piece in pieces)
        views, shape = self._views, self._shape
        here = slice(first, first + len(pieces))
        views["block_table"][here] = self._rows.block_table[slots, : shape.num_pages]
        views["slot"][here] = slots
        views["slot_drawn"][here] = np.where(is_drawing, slots, shape.num_slots)
        views["position"][here] = ends
        for name, array in self._rows.settings.items():
            views[name][here] = array[slots]
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
