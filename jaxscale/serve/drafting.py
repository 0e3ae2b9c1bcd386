"""Speculative decoding: guesses of the next tokens, which one step of the model checks.

What is drawn at a position depends on the logits, the seed and the position alone. So a draft is
right if it is the token that would have been drawn there without it, and speculation changes no
token, whatever the temperature: it only saves steps. The chance that a draft is right is that of
the model, as under rejection sampling of a draft without noise.

Source: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1, for the check of several tokens at
    once; Daliri et al. 2024 (arXiv 2408.07978), section 3, for draws from shared noise.
"""

import weakref
from collections.abc import Sequence as List
from typing import NamedTuple, Protocol

import numpy as np

from jaxscale.models.config import ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.serve.config import EngineConfig
from jaxscale.serve.members import Member
from jaxscale.serve.placement import make_placement
from jaxscale.serve.plan import Plan, SchedulerConfig
from jaxscale.serve.requests import RequestConfig
from jaxscale.serve.runner import Launched, Runner
from jaxscale.serve.sequences import Sequence
from jaxscale.types import InputError, Params

LONGEST_NGRAM = 4


class Drafter(Protocol):
    """Guesses what comes next."""

    def propose(self, members: List[Member], num_drafts: int) -> list[list[int]]:
        """At most `num_drafts` tokens for each of some decoding sequences, all of them known."""

    def admit(self, member: Member) -> None:
        """Takes note of a sequence that has just been given a slot and blocks."""

    def pause(self) -> None:
        """Gives memory back, until `resume`; all sequences are admitted again after it."""

    def resume(self) -> None:
        """Takes it again."""


class NgramDrafter:
    """Guesses that what followed the last tokens before will follow them again.

    Source: Yang et al. 2023 (arXiv 2304.04487), section 3.2, its copies of earlier text.
    """

    def __init__(self):
        self._indices: weakref.WeakKeyDictionary[Sequence, _NgramIndex] = (
            weakref.WeakKeyDictionary()
        )

    def propose(self, members: List[Member], num_drafts: int) -> list[list[int]]:
        """As `Drafter.propose`."""
        found = []
        for member in members:
            index = self._indices.setdefault(member.sequence, _NgramIndex())
            found.append(index.continuation(member.sequence.known(), num_drafts))
        return found

    def admit(self, member: Member) -> None:
        """Nothing: tokens are all that it knows."""

    def pause(self) -> None:
        """Nothing, as `admit`."""

    def resume(self) -> None:
        """Nothing, as `admit`."""


class _NgramIndex:
    """Where each n-gram of a growing text was last."""

    def __init__(self):
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_read = 0

    def continuation(self, tokens: list[int], count: int) -> list[int]:
        """What followed the longest n-gram at the end of `tokens`, where it was before."""
        # The n-grams at the very end are read once something follows them.
        for end in range(max(self._num_read, 1), len(tokens)):
            for size in range(1, min(LONGEST_NGRAM, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self._num_read = len(tokens)
        for size in range(min(LONGEST_NGRAM, len(tokens)), 0, -1):
            end = self._ends.get(tuple(tokens[-size:]))
            if end is not None:
                return tokens[end : end + count]
        return []


class Draft(NamedTuple):
    """A smaller model of the same tokens.

    Args:
        decoder: its layers.
        params: its parameters.
    """

    decoder: Decoder
    params: Params


class ModelDrafter:
    """Draws guesses from a smaller model, whose pages lie beside those of the large one.

    It has the same block table: what a sequence holds of the one cache, it holds of the other.
    Draws are from the same seeds, so that both models often draw the same.

    Args:
        runner: of the small model.
        limits: of a step.
        block_size: tokens a page.
    """

    def __init__(
        self,
        runner: Runner,
        limits: SchedulerConfig,
        block_size: int,
    ):
        self._runner = runner
        self._limits = limits
        self._block_size = block_size
        self._shadows: weakref.WeakKeyDictionary[Sequence, Sequence]
        self._shadows = weakref.WeakKeyDictionary()
        self._configs: weakref.WeakKeyDictionary[Sequence, RequestConfig]
        self._configs = weakref.WeakKeyDictionary()

    def admit(self, member: Member) -> None:
        """As `Drafter.admit`; the small model computes all of its keys anew."""
        sequence, config = member.sequence, member.config
        shadow = Sequence(sequence.number, [], max_new_tokens=0, slot=sequence.slot)
        self._shadows[sequence] = shadow
        self._configs[shadow] = RequestConfig(config.sampling)
        self._runner.admit(shadow, self._configs[shadow], member.index)

    def pause(self) -> None:
        """As `Drafter.pause`."""
        self._runner.free_pages()

    def resume(self) -> None:
        """As `Drafter.resume`."""
        self._runner.take_pages()

    def propose(self, members: List[Member], num_drafts: int) -> list[list[int]]:
        """As `Drafter.propose`."""
        shadows = [self._shadow(member.sequence, num_drafts) for member in members]
        launches = []
        while left := [shadow for shadow in shadows if shadow.num_missing]:
            # All draw their first token before any draws its second.
            first = [shadow for shadow in left if not shadow.num_drawn]
            launches.append(self._launch(first or left))
        for launched in launches:
            tokens = np.asarray(launched.tokens)[0]
            for piece, row in zip(launched.pieces, launched.rows, strict=True):
                if piece.is_drawing:
                    piece.sequence.drafts.append(int(tokens[row]))
        return [shadow.drafts for shadow in shadows]

    def _shadow(self, sequence: Sequence, num_drafts: int) -> Sequence:
        """What the small model runs of a sequence: its tokens, and as many draws as there is room.

        Of what was run before, wrong drafts are forgotten.
        """
        shadow, known = self._shadows[sequence], sequence.known()
        room = len(sequence.blocks) * self._block_size - len(known) + 1
        left = sequence.max_new_tokens - sequence.num_drawn - 1
        shadow.prompt, shadow.outputs, shadow.drafts = list(known), [], []
        shadow.num_drawn, shadow.max_new_tokens = 0, max(min(num_drafts, room, left), 0)
        shadow.blocks = sequence.blocks
        shadow.num_computed = min(shadow.num_computed, len(known) - 1)
        return shadow

    def _launch(self, shadows: List[Sequence]) -> Launched:
        """Runs as much of the sequences as fits a step."""
        plan = Plan(self._limits, self._block_size)
        for shadow in shadows:
            if plan.is_full or not (count := plan.fitting(shadow)):
                break
            plan.add(shadow, count)
        for piece in plan.pieces:
            piece.sequence.num_computed += piece.count
            piece.sequence.num_drawn += piece.is_drawing
        configs = [self._configs[piece.sequence] for piece in plan.pieces]
        return self._runner.launch(tuple(plan.pieces), configs, [None] * len(plan.pieces))


def check_draft(
    draft: Draft | None,
    config: EngineConfig,
    model: ModelConfig,
) -> None:
    """Raises InputError for a smaller model that cannot guess for a model."""
    if draft is None:
        return
    if not config.num_drafts:
        raise InputError("EngineConfig.num_drafts", 0, "above 0 with a model that guesses")
    if draft.decoder.config.vocab_size != model.vocab_size:
        expected = f"a model of {model.vocab_size} tokens"
        raise InputError("draft", draft.decoder.config.vocab_size, expected)
    if draft.decoder.config.max_length < model.max_length:
        expected = f"a model of sequences of {model.max_length} tokens"
        raise InputError("draft", draft.decoder.config.max_length, expected)


def make_drafter(
    draft: Draft | None,
    config: EngineConfig,
    *,
    num_blocks: int,
    num_tokens: int,
) -> Drafter | None:
    """What guesses for an engine; None where nothing does.

    Args:
        draft: a smaller model; None guesses from the text itself.
        config: of the engine.
        num_blocks: pages of the cache.
        num_tokens: only tokens below are drawn.
    """
    if not config.num_drafts:
        return None
    if draft is None:
        return NgramDrafter()
    decoder, size = draft.decoder, config.block_size
    runner = Runner(
        make_placement(decoder, None, block_size=size),
        draft.params,
        buckets=config.buckets(decoder.config.max_length),
        num_blocks=num_blocks,
        block_size=size,
        cache_dtype=decoder.policy.compute,
        num_tokens=num_tokens,
    )
    return ModelDrafter(runner, config.scheduler(decoder.config.max_length), size)
