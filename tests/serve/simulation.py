"""The scheduler with a simulated device, which knows what its cache holds.

python -m tests.serve.simulation 4000000   # so many steps over all policies; prints a table
"""

import dataclasses
import random
import sys
import time

from jaxscale.serve.blocks import BlockPool
from jaxscale.serve.plan import SchedulerConfig
from jaxscale.serve.scheduler import Scheduler
from jaxscale.serve.sequences import FinishReason, Sequence, Status

BLOCK = 4
SMALL = SchedulerConfig(token_budget=8, max_sequences=4, max_prompts=3, max_context=36, max_extra=5)
CASES = [
    dict(),
    dict(admission="growth"),
    dict(policy="prefill_first"),
    dict(use_prefix_cache=False, admission="growth", steps_a_launch=3),
    dict(steps_a_launch=2),
]


def next_token(tokens):
    """What the model draws: few values, so that prefixes are often equal."""
    return (sum(tokens) * 7 + len(tokens)) % 5


def score(context, token):
    """What is known of a token behind its context."""
    return sum(context) % 7, len(context), token


def reference(prompt, count):
    """The tokens behind a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Device:
    """Runs steps in order on a cache of single tokens, and checks that each context is right."""

    def __init__(self, num_blocks):
        self.cache = [None] * ((num_blocks + 1) * BLOCK)
        self.host = {}
        self.last = {}

    def move(self, moves):
        for move in moves:
            here = slice(move.block * BLOCK, (move.block + 1) * BLOCK)
            if move.is_spill:
                self.host[move.place] = self.cache[here]
            else:
                self.cache[here] = self.host[move.place]

    def run(self, step, tables):
        """What each piece draws, or the scores behind its tokens."""
        for piece, (blocks, slot, known) in zip(step.pieces, tables, strict=True):
            assert piece.count == 1 or not piece.is_decode
            tokens = known + list(piece.drafts)
            for position in range(piece.start, piece.start + piece.count):
                is_known = position < len(tokens)
                token = tokens[position] if is_known else self.last[slot]
                self.cache[self.place(blocks, position)] = token
        pairs = zip(step.pieces, tables, strict=True)
        return [self.found(piece, *table) for piece, table in pairs]

    def found(self, piece, blocks, slot, known):
        last_end, found = piece.start + piece.count, []
        for end in range(last_end - piece.num_extra, last_end + piece.num_steps):
            if end > last_end:
                self.cache[self.place(blocks, end - 1)] = self.last[slot]
            context = [self.cache[self.place(blocks, position)] for position in range(end)]
            seen = (known + list(piece.drafts))[:end]
            assert context[: len(seen)] == seen, "the cache holds another context"
            if piece.is_drawing:
                self.last[slot] = next_token(context)
            found.append((context, next_token(context)))
        return found

    @staticmethod
    def place(blocks, position):
        return blocks[position // BLOCK] * BLOCK + position % BLOCK


@dataclasses.dataclass
class Load:
    """A scheduler with its device, a step behind its plan, and the rules that hold at each step."""

    config: SchedulerConfig
    num_blocks: int
    rng: random.Random
    num_places: int = 0

    def __post_init__(self):
        self.blocks = BlockPool(self.num_blocks, BLOCK, self.num_places)
        self.scheduler = Scheduler(self.config, self.blocks)
        self.device = Device(self.num_blocks)
        self.in_flight = None
        self.sequences, self.num_arrived = [], 0
        self.now_s, self.num_tokens, self.num_accepted, self.num_loaded = 0.0, 0, 0, 0

    def arrive(self):
        rng = self.rng
        prompt = [rng.randrange(2) for _ in range(rng.choice([1, 3, 5, 8, 9, 21]))]
        sequence = Sequence(
            number=self.num_arrived,
            prompt=prompt,
            max_new_tokens=rng.choice([1, 2, 7, 12]),
            priority=rng.choice([0, 0, 0, 1]),
            deadline_s=self.now_s + 400 if rng.random() < 0.05 else None,
            is_synchronous=rng.random() < 0.3,
            scores=[None] if rng.random() < 0.2 else None,
        )
        self.num_arrived += 1
        self.sequences.append(sequence)
        self.scheduler.add(sequence)

    def cancel(self):
        self.scheduler.finish(self.rng.choice(self.sequences[-9:]), FinishReason.CANCELLED)

    def propose(self):
        """Drafts, of which the first ones are right, for sequences that wait for nothing."""
        for sequence in self.scheduler.running:
            is_ready = sequence.is_decoding and not sequence.is_in_flight
            if is_ready and sequence.is_synchronous and self.rng.random() < 0.7:
                right = reference(sequence.known(), self.rng.randrange(4))
                sequence.drafts = right + [self.rng.randrange(5)] * self.rng.randrange(3)

    def step(self):
        self.now_s += 1
        self.propose()
        step = self.scheduler.schedule(self.now_s)
        self.check(step)
        moves = self.blocks.take_moves()
        self.num_loaded += sum(not move.is_spill for move in moves)
        self.device.move(moves)
        tables = [
            (list(piece.sequence.blocks), piece.sequence.slot, list(piece.sequence.known()))
            for piece in step.pieces
        ]
        if self.in_flight:
            before, found = self.in_flight
            for piece, of_piece in zip(before.pieces, found, strict=True):
                self.collect(piece, of_piece)
        self.in_flight = (step, self.device.run(step, tables)) if step.pieces else None
        return step

    def collect(self, piece, found):
        """As the engine does."""
        sequence = piece.sequence
        if sequence.status is Status.FINISHED:
            return
        drawn = [token for _, token in found]
        if piece.is_scored:
            for position, (context, _) in enumerate(found, piece.start + 1):
                if position == len(sequence.scores) < len(sequence.prompt):
                    sequence.scores.append(score(context, sequence.prompt[position]))
            self.keep_scores(sequence)
            drawn = drawn[-1:]
        if piece.drafts:
            drawn = piece.accepted(drawn)
            self.num_accepted += len(drawn) - 1
            self.scheduler.settle(piece, len(drawn))
        if piece.is_drawing:
            self.num_tokens += len(self.scheduler.commit(piece, drawn))

    def keep_scores(self, sequence):
        if sequence.is_scoring or sequence.chain is None:
            return
        for number, digest in enumerate(sequence.chain.digests(sequence.prompt)):
            here = sequence.scores[number * BLOCK : (number + 1) * BLOCK]
            if len(here) == BLOCK:
                self.blocks.keep_scores(digest, here)

    def check(self, step):
        config = self.config
        assert step.num_tokens <= config.token_budget
        prompts = [piece for piece in step.pieces if not piece.is_decode]
        assert len(prompts) <= config.max_prompts
        assert sum(piece.num_extra for piece in step.pieces) <= config.max_extra
        running = self.scheduler.running
        assert len(running) <= config.max_sequences
        assert len({sequence.slot for sequence in running}) == len(running)
        held = {block for sequence in running for block in sequence.blocks}
        assert len(held) == self.blocks.num_held
        assert 0 not in held
        planned = {piece.sequence for piece in step.pieces}
        assert len(planned) == len(step.pieces)
        if config.policy == "splitfuse":
            self.check_splitfuse(step, prompts, planned)

    def check_splitfuse(self, step, prompts, planned):
        """No decoding sequence stands still, and a step with more to do is full to the token."""
        stalled = [
            sequence
            for sequence in self.scheduler.running
            if sequence.is_decoding and sequence not in planned and not sequence.is_synchronous
        ]
        assert not stalled
        split = [piece for piece in prompts if not piece.is_drawing]
        context = sum(-(-(each.start + each.count) // BLOCK) * BLOCK for each in prompts)
        assert context <= self.config.max_context
        if any(piece.is_scored for piece in split):
            return  # cut where the rows for its scores end
        if split and context < self.config.max_context:
            assert step.num_tokens == self.config.token_budget
        assert len(split) <= 1, "at most one prompt is cut a step"

    def run(self, num_steps, most_waiting=50):
        """Steps with arrivals and cancels at random; what has ended is checked and forgotten."""
        for number in range(num_steps):
            if self.rng.random() < 0.25 and self.scheduler.num_waiting < most_waiting:
                self.arrive()
            if self.rng.random() < 0.03 and self.sequences:
                self.cancel()
            if self.in_flight is None and self.rng.random() < 0.01:
                self.scheduler.preempt_all()  # other weights, which score otherwise
                for sequence in self.sequences:
                    if sequence.is_scoring:
                        del sequence.scores[1:]
            self.step()
            if number % 1000 == 999:
                self.check_ended()

    def drain(self, limit=2000):
        for _ in range(limit):
            self.step()
            if not self.scheduler.has_work and self.in_flight is None:
                self.check_ended()
                assert not self.sequences
                assert self.blocks.num_held == 0
                assert self.blocks.num_free == self.num_blocks
                return
        raise AssertionError("deadlock")

    def check_ended(self):
        """Every token of what has ended is right, and every score."""
        open_ones = []
        for sequence in self.sequences:
            if sequence.status is not Status.FINISHED:
                assert self.num_arrived - sequence.number < 2000, "a sequence starves"
                open_ones.append(sequence)
                continue
            wanted = reference(sequence.prompt, sequence.max_new_tokens)
            is_whole = sequence.finish_reason is FinishReason.LENGTH
            assert sequence.outputs == (wanted if is_whole else wanted[: len(sequence.outputs)])
            for position, found in enumerate(sequence.scores or (), 0):
                prompt = sequence.prompt
                assert position == 0 or found == score(prompt[:position], prompt[position])
            assert not (is_whole and sequence.is_scoring)
        self.sequences = open_ones


def main(num_steps):
    """Prints what was run, a case a line."""
    print("| policy | blocks | host | steps | sequences | tokens | preempted | drafts right | s |")
    for number, changes in enumerate(CASES * 2):
        began = time.perf_counter()
        config = dataclasses.replace(SMALL, **changes)
        num_blocks, num_places = ((9, 0), (12, 20))[number >= len(CASES)]
        load = Load(config, num_blocks, random.Random(number), num_places)
        load.run(num_steps // (2 * len(CASES)))
        load.drain()
        cells = [
            ", ".join(f"{name} {value}" for name, value in changes.items()) or "default",
            num_blocks,
            num_places,
            num_steps // (2 * len(CASES)),
            load.num_arrived,
            load.num_tokens,
            load.scheduler.num_preemptions,
            load.num_accepted,
            f"{time.perf_counter() - began:.0f}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
