"""What the scheduler knows of a sequence, and what it plans for a step; no arrays."""

import dataclasses
import enum
from collections.abc import Sequence as List
from typing import Any

from jaxscale.serve.blocks import PrefixChain


class Status(enum.StrEnum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"


@dataclasses.dataclass(eq=False)
class Sequence:
    """A prompt and what was drawn behind it.

    Args:
        number: orders sequences by their arrival.
        prompt: token ids.
        max_new_tokens: how many are drawn at most.
        priority: higher ones come first.
        deadline_s: on the clock that `Scheduler.schedule` is given; None for never.
        is_synchronous: no step is planned while a token of it is being drawn, for what the step
            computes depends on it (a grammar).
        salt: what else its cached prefix depends on.
        scores: of the first prompt tokens, what is known of their log-probabilities; None for a
            sequence of which none are asked.
        drafts: guesses of the tokens that come next, which the next step may check.
        switch_lengths: lengths above which all of its keys are others (LongRoPE).
        outputs: the tokens drawn, as far as they are known.
        num_drawn: tokens drawn or being drawn.
        num_computed: tokens whose keys are in the cache once the steps planned so far have run.
        num_cached: prompt tokens that a prefix in the cache has spared, at its first admission.
        blocks: of the cache, in order of the tokens.
        admitted_side: the side that its keys in the cache are of.
        slot: its row in the device's state while it runs.
    """

    number: int
    prompt: list[int]
    max_new_tokens: int
    priority: int = 0
    deadline_s: float | None = None
    is_synchronous: bool = False
    salt: str = ""
    scores: list[Any] | None = None
    switch_lengths: tuple[int, ...] = ()
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    outputs: list[int] = dataclasses.field(default_factory=list)
    num_drawn: int = 0
    num_computed: int = 0
    num_cached: int | None = None
    num_registered: int = 0
    num_preemptions: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    drafts: list[int] = dataclasses.field(default_factory=list)
    slot: int | None = None
    admitted_side: int = 0
    chain: PrefixChain | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Lower ones come first."""
        return -self.priority, self.number

    @property
    def length(self) -> int:
        """Tokens of the prompt and of what is drawn or being drawn."""
        return len(self.prompt) + self.num_drawn

    @property
    def side(self) -> int:
        """How many switch lengths it has outgrown."""
        if not self.switch_lengths:
            return 0
        return sum(self.length > switch for switch in self.switch_lengths)

    @property
    def num_missing(self) -> int:
        """Tokens to run before the next one can be drawn; 0 once the last one is drawn."""
        if self.num_drawn == self.max_new_tokens:
            return 0
        return self.length - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether its next step takes the token drawn last and nothing else."""
        return self.num_drawn > 0 and self.num_missing == 1

    @property
    def is_in_flight(self) -> bool:
        """Whether a token is being drawn whose value is not known yet."""
        return self.num_drawn > len(self.outputs)

    @property
    def is_scoring(self) -> bool:
        """Whether log-probabilities of prompt tokens are still missing."""
        return self.scores is not None and len(self.scores) < len(self.prompt)

    @property
    def max_cached(self) -> int:
        """Tokens in the cache at its end: the last one drawn is never run."""
        return len(self.prompt) + self.max_new_tokens - 1

    def known(self) -> list[int]:
        """The prompt and the tokens drawn whose values are known."""
        return self.prompt + self.outputs if self.outputs else self.prompt


@dataclasses.dataclass(eq=False, slots=True)
class Piece:
    """Tokens of one sequence that a step runs.

    Args:
        sequence: whose.
        start: position of the first.
        count: how many.
        is_decode: whether the only token is the one drawn last, which the device knows.
        is_drawing: whether a token is drawn behind the last.
        length: of the sequence as the step finds it, without what the step draws.
        drafts: guesses that are run behind the token drawn last, to be compared with what is drawn
            before each.
        is_scored: whether the token behind each, of the prompt, is given its log-probability.
        num_steps: each after the first runs the token that the one before drew. The launch may have
            more, in which the sequence stands still.
    """

    sequence: Sequence
    start: int
    count: int
    is_decode: bool
    is_drawing: bool
    length: int
    drafts: tuple[int, ...] = ()
    is_scored: bool = False
    num_steps: int = 1

    @property
    def num_extra(self) -> int:
        """Tokens before the last behind which logits are wanted, too."""
        return self.count - 1 if self.drafts or self.is_scored else 0

    def tokens(self) -> list[int]:
        """What runs, as far as the host knows it."""
        known = self.sequence.known()[self.start : self.start + self.count]
        return [*known, *self.drafts]

    def accepted(self, drawn: List[int]) -> list[int]:
        """Of the tokens drawn behind each of its own, those whose context was right."""
        is_right = [draft == token for draft, token in zip(self.drafts, drawn, strict=False)]
        num_right = is_right.index(False) if False in is_right else len(is_right)
        return list(drawn[: num_right + 1])


@dataclasses.dataclass(frozen=True)
class Step:
    """What runs next.

    Args:
        pieces: decoding sequences first.
        admitted: sequences that have just been given a slot and blocks.
        preempted: sequences that lost theirs and start again.
        expired: sequences whose deadline has passed.
    """

    pieces: tuple[Piece, ...] = ()
    admitted: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    expired: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the step runs."""
        return sum(piece.count for piece in self.pieces)
