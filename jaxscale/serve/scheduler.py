"""Which tokens run in the next step: Dynamic SplitFuse, as a state machine without arrays."""

import bisect
import heapq
import math
from collections.abc import Iterable

from jaxscale.serve.blocks import BlockPool, PrefixChain
from jaxscale.serve.plan import TOKENS_A_LAUNCH, Plan, SchedulerConfig
from jaxscale.serve.sequences import FinishReason, Piece, Sequence, Status, Step
from jaxscale.types import InputError

MIN_HEAP = 64  # entries for which it is not worth looking for those that have ended


class Scheduler:
    """Sequences that wait and run; `schedule` plans a step and `commit` takes what it drew.

    A step may be planned while the one before it runs. What is planned by then holds whatever was
    drawn, but for a sequence that turns out to have ended: what its last step draws is dropped.

    Sequences of one priority are admitted in order of arrival, none overtakes. Under "lifetime" a
    running sequence never waits for a block; under "growth" the first in rank can take the blocks
    of all others. Each fits the cache alone, which `add` checks: so there is no deadlock.

    Source: Holmes et al. 2024, DeepSpeed-FastGen (arXiv 2401.08671), section 3.2, Dynamic
        SplitFuse.
    Args:
        config: limits and policies.
        blocks: of the cache.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockPool):
        self.config = config
        self.blocks = blocks
        self.running: list[Sequence] = []  # by rank
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap by rank
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap
        self._slots = list(reversed(range(config.max_sequences)))
        self._num_waiting = 0
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that have no slot yet, or have lost it."""
        return self._num_waiting

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.running or self._num_waiting)

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence in.

        Raises:
            InputError: it would not fit the cache even alone.
        """
        wanted = self.blocks.num_for(sequence.max_cached)
        if wanted > self.blocks.num_blocks:
            expected = (
                "prompt + max_new_tokens to fit the cache: blocks needed <= blocks, here "
                f"{wanted} <= {self.blocks.num_blocks}"
            )
            raise InputError("prompt", f"{len(sequence.prompt)} tokens", expected)
        self._wait(sequence)
        if sequence.deadline_s is not None:
            heapq.heappush(self._deadlines, (sequence.deadline_s, sequence.number, sequence))
        for heap in (self._waiting, self._deadlines):
            self._forget_ended(heap)

    def finish(self, sequence: Sequence, reason: FinishReason) -> bool:
        """Ends a sequence in whatever state it is; false if it had ended already."""
        if sequence.status is Status.FINISHED:
            return False
        if sequence.status is Status.RUNNING:
            self._vacate(sequence)
        else:
            self._num_waiting -= 1
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        return True

    def schedule(self, now_s: float = 0.0) -> Step:
        """Plans a step; one without pieces if nothing can run."""
        expired = self.expire(now_s)
        plan = Plan(self.config, self.blocks.block_size)
        if self.config.policy == "splitfuse":
            self._decode(plan)
            self._continue_prompts(plan)
            self._admit(plan)
        else:
            self._continue_prompts(plan)
            self._admit(plan)
            if not plan.pieces:
                self._decode(plan)
        self._loop(plan.pieces)
        for piece in plan.pieces:
            if piece.sequence not in plan.advanced:
                self._advance(piece)
        return Step(tuple(plan.pieces), tuple(plan.admitted), tuple(plan.preempted), expired)

    def expire(self, now_s: float) -> tuple[Sequence, ...]:
        """Ends the sequences whose deadline has passed."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, _, sequence = heapq.heappop(self._deadlines)
            if self.finish(sequence, FinishReason.TIMEOUT):
                expired.append(sequence)
        return tuple(expired)

    def next_deadline_s(self) -> float:
        """When the next sequence may expire; infinity for never."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    def settle(self, piece: Piece, num_accepted: int) -> None:
        """Takes back what was planned of drafts that turn out wrong; `commit` comes after it.

        Args:
            piece: with drafts.
            num_accepted: tokens that will be committed.
        """
        sequence = piece.sequence
        sequence.num_drawn = len(sequence.outputs) + num_accepted
        if sequence.status is Status.RUNNING:
            sequence.num_computed = piece.start + num_accepted

    def commit(self, piece: Piece, tokens: Iterable[int]) -> list[int]:
        """Appends what a piece drew to its sequence, which ends at its last token.

        Returns:
            The tokens appended: none if the sequence had ended before.
        """
        sequence, appended = piece.sequence, []
        for token in tokens:
            if sequence.status is Status.FINISHED:
                break
            sequence.outputs.append(token)
            appended.append(token)
            if len(sequence.outputs) == sequence.max_new_tokens:
                self.finish(sequence, FinishReason.LENGTH)
        if sequence.status is Status.RUNNING:
            self._register(sequence)
        return appended

    def preempt_all(self) -> list[Sequence]:
        """Takes slot and blocks from all that run, and forgets what the cache holds.

        They start again with the tokens they have, as when the weights change.
        """
        preempted = list(self.running)
        for sequence in preempted:
            self._preempt(sequence)
        self.blocks.forget()
        return preempted

    # Parts of a plan

    def _decode(self, plan: Plan) -> None:
        """A token of each decoding sequence, by rank."""
        running = list(self.running)
        for number, sequence in enumerate(running):
            if sequence.status is not Status.RUNNING or not sequence.is_decoding:
                continue  # it may have lost its blocks to one before it
            if sequence.side != sequence.admitted_side:
                self._preempt(sequence)  # all of its keys are others from here on
                plan.preempted.append(sequence)
                continue
            if self._is_held_up(sequence) or not self._grow(sequence, plan):
                continue
            # Each of those behind has a token in this step before any draft has.
            spare = plan.budget - (len(running) - number)
            drafts = self._fitting_drafts(sequence, plan, spare) if sequence.drafts else ()
            plan.add(sequence, 1, drafts)

    def _fitting_drafts(
        self,
        sequence: Sequence,
        plan: Plan,
        spare: int,
    ) -> tuple[int, ...]:
        """The drafts for which there is room in the step, the blocks and the sequence."""
        limits = [switch - sequence.length for switch in sequence.switch_lengths]
        left = sequence.max_new_tokens - sequence.num_drawn - 1
        room = [
            spare,
            left,
            plan.room_for_drafts(sequence),
            *(each for each in limits if each >= 0),
        ]
        num = min(len(sequence.drafts), *room)
        if num < 1:
            return ()
        size = self.blocks.block_size
        while sequence.num_computed + num >= len(sequence.blocks) * size:
            if not self.blocks.can_take((), 1):
                break  # for drafts nobody is preempted
            sequence.blocks += self.blocks.take((), 1)
        num = min(num, len(sequence.blocks) * size - sequence.num_computed - 1)
        return tuple(sequence.drafts[:num])

    def _continue_prompts(self, plan: Plan) -> None:
        for sequence in self.running:
            if plan.is_full:
                return
            num_missing = sequence.num_missing
            is_prompt = num_missing > 1 or (num_missing and not sequence.num_drawn)
            if is_prompt and not self._is_held_up(sequence):
                if not (count := plan.fitting(sequence)):
                    return
                self._add_prompt(plan, sequence, count)

    def _admit(self, plan: Plan) -> None:
        while not plan.is_full and self._slots:
            sequence = self._next_waiting()
            if sequence is None or sequence in plan.preempted or self._is_held_up(sequence):
                return
            if sequence.is_in_flight or not self._hold_blocks(sequence):
                return
            heapq.heappop(self._waiting)
            self._num_waiting -= 1
            sequence.status = Status.RUNNING
            sequence.slot = self._slots.pop()
            bisect.insort(self.running, sequence, key=lambda each: each.rank)
            plan.admitted.append(sequence)
            if not (count := plan.fitting(sequence)):
                return
            self._add_prompt(plan, sequence, count)

    def _add_prompt(
        self,
        plan: Plan,
        sequence: Sequence,
        count: int,
    ) -> None:
        """Plans a piece of a prompt; those admitted behind it already share its blocks."""
        plan.add(sequence, count)
        piece = plan.pieces[-1]
        if not piece.is_decode:  # of which several steps may yet be planned
            plan.advanced.add(sequence)
            self._advance(piece)

    def _loop(self, pieces: list[Piece]) -> None:
        """Plans several steps at once where no step could differ from the first but by its ends."""
        num = min(self.config.steps_a_launch, TOKENS_A_LAUNCH // max(len(pieces), 1))
        is_all = len(pieces) == len(self.running) and not self._num_waiting
        if num < 2 or not is_all or not all(map(self._can_loop, pieces)):
            return
        num = 1 << num.bit_length() - 1  # powers of two, so that few programs are compiled
        for piece in pieces:
            sequence = piece.sequence
            room = len(sequence.blocks) * self.blocks.block_size - piece.start
            left = sequence.max_new_tokens - sequence.num_drawn
            piece.num_steps = min(num, room, left)

    def _can_loop(self, piece: Piece) -> bool:
        sequence = piece.sequence
        return piece.is_decode and not sequence.is_synchronous and not sequence.switch_lengths

    def _is_held_up(self, sequence: Sequence) -> bool:
        return sequence.is_synchronous and sequence.is_in_flight

    def _hold_blocks(self, sequence: Sequence) -> bool:
        """Whether the sequence could be given the blocks with which it is admitted."""
        tokens = sequence.known()
        if sequence.chain is None or sequence.side != sequence.admitted_side:
            salt = f"{sequence.salt}/{sequence.side}"
            sequence.chain = PrefixChain(self.blocks.block_size, salt)
            sequence.admitted_side = sequence.side
        shared, wanted = [], []
        if self.config.use_prefix_cache:
            # The last token has to run, for something to be drawn behind it.
            most = (len(tokens) - 1) // self.blocks.block_size
            wanted = sequence.chain.digests(tokens)[:most]
            if sequence.is_scoring:
                wanted = wanted[: self._num_unscored(sequence)]
            shared = self.blocks.find(wanted)
        is_whole = self.config.admission == "lifetime"
        num_tokens = sequence.max_cached if is_whole else len(tokens)
        num_new = self.blocks.num_for(num_tokens) - len(shared)
        if not self.blocks.can_take(shared, num_new):
            return False
        sequence.blocks = self.blocks.take(shared, num_new)
        new = sequence.blocks[len(shared) :]
        num_known = len(shared) + self.blocks.load(new, wanted[len(shared) :])
        sequence.num_computed = num_known * self.blocks.block_size
        sequence.num_registered = num_known
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return True

    def _num_unscored(self, sequence: Sequence) -> int:
        """Blocks that need not run for the log-probabilities that are missing.

        Those that others have computed are taken over. What comes first behind a block is scored
        by its last token, which is why that block runs, too.
        """
        size, scores = self.blocks.block_size, sequence.scores
        for number, digest in enumerate(sequence.chain.digests(sequence.prompt)):
            known = self.blocks.scores_of(digest)
            if known is None or len(scores) < number * size:
                break
            scores += known[len(scores) - number * size :]
        return (len(scores) - 1) // size

    def _grow(self, sequence: Sequence, plan: Plan) -> bool:
        """Whether the sequence has a block for its next token, if need be that of another."""
        if sequence.num_computed < len(sequence.blocks) * self.blocks.block_size:
            return True
        while not self.blocks.can_take((), 1):
            victim = self.running[-1]
            self._preempt(victim)
            plan.preempted.append(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.blocks.take((), 1)
        return True

    # State

    def _advance(self, piece: Piece) -> None:
        sequence = piece.sequence
        sequence.num_computed += piece.count * piece.num_steps
        sequence.drafts = []
        if piece.is_drawing:
            sequence.num_drawn += piece.num_steps
        self._register(sequence)

    def _register(self, sequence: Sequence) -> None:
        """Makes the blocks known that are full of known tokens.

        A step that is planned counts as run: those that may find the block run in it or after it,
        and each layer writes its keys before it reads any.
        """
        if not self.config.use_prefix_cache:
            return
        size = self.blocks.block_size
        num_known = len(sequence.prompt) + len(sequence.outputs)
        num_full = min(sequence.num_computed, num_known) // size
        if num_full <= sequence.num_registered:
            return
        digests = sequence.chain.digests(sequence.known())
        for i in range(sequence.num_registered, num_full):
            self.blocks.register(sequence.blocks[i], digests[i])
        sequence.num_registered = num_full

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        heapq.heappush(self._waiting, (sequence.rank, sequence))
        self._num_waiting += 1

    def _next_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].status is Status.FINISHED:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _vacate(self, sequence: Sequence) -> None:
        """Takes blocks and slot; steps in flight still write there, and before any later owner."""
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks)
        self._slots.append(sequence.slot)
        sequence.blocks, sequence.drafts, sequence.slot = [], [], None
        sequence.num_computed = sequence.num_registered = 0

    def _preempt(self, sequence: Sequence) -> None:
        self._vacate(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(sequence)

    def _forget_ended(self, heap: list[tuple]) -> None:
        """Drops what has ended from a heap of sequences, once that is most of it.

        Else all that came within the longest timeout, or behind one that waits, would be kept.
        """
        if len(heap) > 2 * (len(self.running) + self._num_waiting) + MIN_HEAP:
            heap[:] = [each for each in heap if each[-1].status is not Status.FINISHED]
            heapq.heapify(heap)
