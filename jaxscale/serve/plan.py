"""The limits of a step, and a step while it is planned."""

import dataclasses
from typing import Literal

from jaxscale.serve.sequences import Piece, Sequence
from jaxscale.types import InputError, RunError, check_positive, check_types

# Sequences times steps of a launch, at most: who comes meanwhile waits for its end, on an H200 some
# 15 ms with a model of 1.1B.
TOKENS_A_LAUNCH = 1024


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and the policies.

    Args:
        token_budget: tokens a step, of decoding sequences and prompts together.
        max_sequences: sequences that run at a time.
        max_prompts: prompts of which a step runs a piece.
        max_context: tokens of these prompts up to the ends of their pieces, together, in whole
            blocks; what their attention reads.
        policy: "splitfuse" runs a token of every decoding sequence first and fills the budget up
            with pieces of prompts; "prefill_first" lets decoding wait while there are prompts, as
            engines did before, for comparison.
        admission: "lifetime" admits a sequence once its blocks are free to its last token; "growth"
            once those of its prompt are, and takes blocks from the newest when none is left, whose
            keys are then computed again.
        max_extra: tokens a step, beside the last of each piece, behind which logits are wanted:
            drafts, and prompts whose log-probabilities are asked for.
        use_prefix_cache: whether sequences share the blocks of equal prefixes.
        steps_a_launch: steps that are planned at once, at most, while nothing but decoding
            sequences is there.
    """

    token_budget: int = 2048
    max_sequences: int = 256
    max_prompts: int = 16
    max_context: int = 8192
    max_extra: int = 256
    policy: Literal["splitfuse", "prefill_first"] = "splitfuse"
    admission: Literal["lifetime", "growth"] = "lifetime"
    use_prefix_cache: bool = True
    steps_a_launch: int = 1

    def __post_init__(self):
        check_types(self)
        counts = (
            "token_budget",
            "max_sequences",
            "max_prompts",
            "max_context",
            "max_extra",
            "steps_a_launch",
        )
        for name in counts:
            check_positive(f"SchedulerConfig.{name}", getattr(self, name))
        if self.max_sequences > self.token_budget:
            expected = (
                f"max_sequences <= token_budget = {self.token_budget}, so that every decoding "
                "sequence has a token in each step"
            )
            raise InputError("SchedulerConfig.max_sequences", self.max_sequences, expected)


class Plan:
    """A step while it is planned.

    Args:
        config: limits.
        block_size: tokens a block.
    """

    def __init__(self, config: SchedulerConfig, block_size: int):
        self.budget = config.token_budget
        self._max_prompts = config.max_prompts
        self._context = config.max_context
        self._extra = config.max_extra
        self._block_size = block_size
        self.pieces: list[Piece] = []
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.advanced: set[Sequence] = set()  # whose state is that after the step

    @property
    def is_full(self) -> bool:
        """Whether no piece of a prompt has a place any more."""
        return self.budget < 1 or self._max_prompts < 1

    def fitting(self, sequence: Sequence) -> int:
        """Tokens of a prompt that fit beside what is planned."""
        if sequence.is_decoding:  # from a cached prefix of all its tokens but the last
            return min(self.budget, 1)
        room = self._context_room(sequence)
        if sequence.is_scoring:
            room = min(room, self._extra + 1)
        return max(min(sequence.num_missing, self.budget, room), 0)

    def room_for_drafts(self, sequence: Sequence) -> int:
        """Drafts of a decoding sequence that fit beside what is planned."""
        if self._max_prompts < 1:
            return 0
        return min(self._extra, self._context_room(sequence) - 1)

    def _context_room(self, sequence: Sequence) -> int:
        return self._context // self._block_size * self._block_size - sequence.num_computed

    def add(
        self,
        sequence: Sequence,
        count: int,
        drafts: tuple[int, ...] = (),
    ) -> None:
        """Plans the next `count` tokens of a sequence, and drafts behind them.

        Raises:
            RunError: the budget has no room for them.
        """
        num_missing = sequence.num_missing
        is_drawing = count == num_missing
        is_decode = num_missing == 1 and sequence.num_drawn > 0 and not drafts
        count += len(drafts)
        if count < 1 or count > self.budget:
            raise RunError(f"{count} tokens are planned, {self.budget} are left of the budget")
        piece = Piece(
            sequence=sequence,
            start=sequence.num_computed,
            count=count,
            is_decode=is_decode,
            is_drawing=is_drawing,
            length=sequence.length,
            drafts=drafts,
            # Of a prompt whose last piece is in flight the scores are as good as known.
            is_scored=sequence.is_scoring and sequence.num_computed + 1 < len(sequence.prompt),
        )
        self.pieces.append(piece)
        self._extra -= piece.num_extra
        self.budget -= count
        if not is_decode:
            num_blocks = -(-(piece.start + count) // self._block_size)
            self._context -= num_blocks * self._block_size
            self._max_prompts -= 1
