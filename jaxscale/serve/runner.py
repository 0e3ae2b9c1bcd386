"""Runs the steps of a plan on the device, whose state stays there."""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence as List
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.serve import packing
from jaxscale.serve.blocks import Move
from jaxscale.serve.drawing import DrawKind
from jaxscale.serve.packing import Buckets, StepShape
from jaxscale.serve.placement import Placement
from jaxscale.serve.plan import TOKENS_A_LAUNCH
from jaxscale.serve.programs import (
    Seen,
    draw_program,
    forward_program,
    loop_program,
    write_seen,
)
from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.rows import HostRows, Writer
from jaxscale.serve.sequences import Piece, Sequence
from jaxscale.serve.spilling import HostPages
from jaxscale.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step that the device runs.

    Args:
        pieces: what it runs, in the order of its rows.
        rows: the row of each piece.
        extra: of a piece by its place in `pieces`, the rows of its tokens before the last.
        tokens: [steps, R] int32 drawn.
        logprobs: as `drawing.log_probabilities` of each step, or None.
        weights_version: of the weights that it runs with.
    """

    pieces: tuple[Piece, ...]
    rows: tuple[int, ...]
    extra: dict[int, range]
    tokens: Array
    logprobs: tuple[Array, Array, Array] | None
    weights_version: int

    def rows_of(self, place: int) -> list[int]:
        """The rows of a piece's tokens behind which logits were wanted, in their order."""
        return [*self.extra.get(place, ()), self.rows[place]]


class Runner:
    """The device's side of the engine: parameters, pages and what was drawn last.

    All state is donated from step to step, so that it is updated in place. Besides it a step takes
    one array from the host.

    Args:
        placement: the model, and where it runs.
        params: the parameter tree.
        buckets: sizes that are compiled.
        num_blocks: pages, without the one for padding.
        block_size: tokens a page.
        cache_dtype: of keys and values.
        num_tokens: only tokens below are drawn.
        adapters: names of those that stand side by side in `params`.
    """

    def __init__(
        self,
        placement: Placement,
        params: Params,
        *,
        buckets: Buckets,
        num_blocks: int,
        block_size: int,
        cache_dtype: str,
        num_tokens: int,
        adapters: tuple[str, ...] = (),
    ):
        self._adapters = {name: number for number, name in enumerate(adapters, 1)}
        self._placement = placement
        self._buckets = buckets
        self._block_size = block_size
        self._num_tokens = num_tokens
        self.weights_version = 0
        self._params: Params = placement.prepare(params)
        self._empty_caches = functools.partial(
            placement.empty_caches, num_blocks + 1, block_size, cache_dtype
        )
        self._caches: Any = self._empty_caches()
        self._last_tokens = placement.everywhere((buckets.num_slots,), jnp.int32)
        self._seen: Seen | None = None
        self._rows = HostRows(buckets, self._num_tokens)
        self._host_pages = HostPages()

    def swap(self, params: Params) -> None:
        """Takes other weights from the next step on."""
        self._host_pages.clear()
        self._params = None  # so that both do not have to fit
        self._params = self._placement.prepare(params)
        self.weights_version += 1

    def free_pages(self) -> None:
        """Gives the pages' memory back; `take_pages` comes before the next step."""
        self._caches = None
        self._host_pages.clear()

    def take_pages(self) -> None:
        """Takes memory for pages that hold nothing."""
        self._caches = self._empty_caches()

    def warm_up(self, num_steps: int) -> int:
        """Compiles every step, and runs it on padding; returns how many there are.

        Decoding sequences may run up to `num_steps` a launch.
        """
        shapes = self._buckets.all_shapes()
        kinds = DrawKind(), DrawKind(has_noise=True)
        launches = []
        for shape, kind in itertools.product(shapes, kinds):
            # What has room in a shape may be a quarter of it.
            most = min(num_steps, 4 * TOKENS_A_LAUNCH // shape.num_single)
            nums = (1,) if shape.num_prompts else packing.powers_up_to(most)
            launches += [(shape, kind, num) for num in nums]
        # Forwards are the same for all kinds.
        apart = [each for each in launches if each[2] > 1 or each[1] == kinds[0]]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(lambda launch: self._compile(*launch), apart))
        for shape, kind, num in launches:
            packed = packing.empty(shape)[0]
            self._launch(shape, packed, is_penalised=False, kind=kind, num_steps=num)
        jax.block_until_ready(self._last_tokens)
        return len(shapes)

    def _compile(
        self,
        shape: StepShape,
        kind: DrawKind,
        num_steps: int,
    ) -> None:
        """Compiles a forward, or a loop of several steps, which then runs without delay."""
        packed = packing.empty(shape)[0]
        if num_steps > 1:
            program = loop_program(self._placement, shape, self._num_tokens, kind, num_steps)
            state: Any = (self._last_tokens, None), packed
        else:
            program = forward_program(self._placement, shape)
            state = self._last_tokens, packed
        program.lower(self._params, self._caches, *state).compile()

    def move(self, moves: List[Move]) -> None:
        """Has pages go to the host's memory or come back, before the next step."""
        self._caches = self._host_pages.move(self._caches, moves)

    def admit(self, sequence: Sequence, config: RequestConfig, index: int) -> None:
        """Writes a sequence's settings to its slot; call it before the first step that runs it."""
        slot = sequence.slot
        self._rows.write(slot, config, index, self._adapters.get(config.adapter, 0))
        if not config.is_penalised:
            return
        if self._seen is None:
            shape = (self._buckets.num_slots, self._num_tokens)
            everywhere = self._placement.everywhere
            self._seen = Seen(everywhere(shape, bool), everywhere(shape, jnp.int32))
        is_in_prompt = np.zeros(self._num_tokens, bool)
        is_in_prompt[[token for token in sequence.prompt if token < self._num_tokens]] = True
        counts = np.bincount(sequence.outputs, minlength=self._num_tokens).astype(np.int32)
        self._seen = write_seen(self._seen, slot, is_in_prompt, counts)

    def launch(
        self,
        pieces: tuple[Piece, ...],
        configs: List[RequestConfig],
        masks: List[List[np.ndarray] | None],
    ) -> Launched:
        """Starts a step; nothing waits for the device.

        Args:
            pieces: what runs.
            configs: of each piece's request.
            masks: what each piece's grammar allows, [words] int32 for each of the rows that draw,
                of which the last ones may be missing; None for all tokens.
        """
        shape, packed, rows, extra = self._pack(pieces)
        of_rows = None
        if any(masks):
            num_words = len(next(filter(None, masks))[0])
            of_rows = np.full((shape.rows.num_rows, num_words), -1, np.int32)
            for place, of_piece in enumerate(masks):
                # The rows before the last draw behind drafts, but only score tokens of a prompt.
                before = extra.get(place, ()) if pieces[place].drafts else ()
                for row, mask in zip((*before, rows[place]), of_piece or ()):
                    of_rows[row] = mask
        tokens, logprobs = self._launch(
            shape,
            packed,
            masks=of_rows,
            is_penalised=any(config.is_penalised for config in configs),
            kind=DrawKind.of(configs, is_scored=any(piece.is_scored for piece in pieces)),
            num_steps=_power_of_two(max(piece.num_steps for piece in pieces)),
        )
        for array in jax.tree.leaves((tokens, logprobs)):
            array.copy_to_host_async()
        return Launched(pieces, rows, extra, tokens, logprobs, self.weights_version)

    def _launch(
        self,
        shape: StepShape,
        packed: np.ndarray,
        *,
        masks: np.ndarray | None = None,
        is_penalised: bool,
        kind: DrawKind,
        num_steps: int = 1,
    ) -> tuple[Array, Any]:
        """(tokens, log-probabilities or None) of a launch; the device's state is that after it."""
        seen = self._seen if is_penalised else None
        if num_steps > 1:
            program = loop_program(self._placement, shape, self._num_tokens, kind, num_steps)
            state = self._last_tokens, seen
            self._caches, state, drawn = program(self._params, self._caches, state, packed)
            self._take(state)
            return drawn
        forward = forward_program(self._placement, shape)
        state = self._caches, self._last_tokens
        logits, rows, self._caches = forward(self._params, *state, packed)
        draw = draw_program(shape.rows, self._num_tokens, kind, self._placement.invariant)
        state, tokens, logprobs = draw((self._last_tokens, seen), logits, rows, masks)
        self._take(state)
        return tokens, logprobs

    def _take(self, state: tuple[Array, Seen | None]) -> None:
        """Keeps the state after a draw, which leaves penalties out where none is asked for."""
        self._last_tokens, seen = state
        self._seen = self._seen if seen is None else seen

    def _pack(
        self,
        pieces: tuple[Piece, ...],
    ) -> tuple[StepShape, np.ndarray, tuple[int, ...], dict[int, range]]:
        """(shape, packed array, the row of each piece, its extra rows as in `Launched`)."""
        single = [piece for piece in pieces if piece.count == 1]
        longer = [piece for piece in pieces if piece.count > 1]
        pages = [-(-(piece.start + piece.count) // self._block_size) for piece in longer]
        last = max((piece.start + piece.num_steps - 1 for piece in single), default=0)
        shape = self._buckets.shape(
            num_single=len(single),
            num_pages=last // self._block_size + 1,
            num_tokens=sum(piece.count for piece in pieces),
            num_prompt_pages=sum(pages),
            num_extra=sum(piece.num_extra for piece in longer),
        )
        packed, views = packing.empty(shape)
        writer = Writer(views, self._rows, self._block_size, shape)
        writer.add_single(single)
        writer.add_prompts(longer)
        # Sequences of one token have the first rows, and both kinds keep their order.
        of_single, of_longer = itertools.count(), itertools.count(shape.num_single)
        rows = tuple(next(of_single if piece.count == 1 else of_longer) for piece in pieces)
        extra, first = {}, shape.num_single + shape.num_prompts
        for place, piece in enumerate(pieces if longer else ()):
            if piece.num_extra:
                extra[place] = range(first, first + piece.num_extra)
                first += piece.num_extra
        return shape, packed, rows, extra


def _power_of_two(number: int) -> int:
    """The smallest one that is no smaller."""
    return 1 << (number - 1).bit_length()
