"""The scheduler under random loads, with a simulated device that knows what its cache holds."""

import dataclasses
import random

import pytest

from jaxscale.serve.blocks import BlockPool
from jaxscale.serve.plan import SchedulerConfig
from jaxscale.serve.scheduler import Scheduler
from jaxscale.serve.sequences import FinishReason, Sequence, Status
from jaxscale.types import InputError

BLOCK = 4
SMALL = SchedulerConfig(token_budget=8, max_sequences=4, max_prompts=3, max_context=36)


def next_token(tokens):
    """What the model draws: few values, so that prefixes are often equal."""
    return (sum(tokens) * 7 + len(tokens)) % 5


class Device:
    """Runs steps in order on a cache of single tokens, and checks that each context is right."""

    def __init__(self, num_blocks):
        self.cache = [None] * ((num_blocks + 1) * BLOCK)
        self.last = {}

    def run(self, step, tables):
        drawn = []
        for piece, (blocks, slot, tokens) in zip(step.pieces, tables, strict=True):
            assert piece.count == 1 or not piece.is_decode
            for position in range(piece.start, piece.start + piece.count):
                is_known = position < len(tokens)
                token = tokens[position] if is_known else self.last[slot]
                self.cache[self.place(blocks, position)] = token
        for piece, (blocks, slot, tokens) in zip(step.pieces, tables, strict=True):
            first_end, new = piece.start + piece.count, []
            for end in range(first_end, first_end + piece.num_steps):
                if end > first_end:
                    self.cache[self.place(blocks, end - 1)] = self.last[slot]
                context = [self.cache[self.place(blocks, position)] for position in range(end)]
                known = tokens[:end]
                assert context[: len(known)] == known, "the cache holds another context"
                if piece.is_drawing:
                    self.last[slot] = next_token(context)
                    new.append(self.last[slot])
            drawn.append(new)
        return drawn

    @staticmethod
    def place(blocks, position):
        return blocks[position // BLOCK] * BLOCK + position % BLOCK


def reference(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclasses.dataclass
class Load:
    """A scheduler with its device, a step behind its plan, and the rules that hold at each step."""

    config: SchedulerConfig
    num_blocks: int
    rng: random.Random

    def __post_init__(self):
        self.blocks = BlockPool(self.num_blocks, BLOCK)
        self.scheduler = Scheduler(self.config, self.blocks)
        self.device = Device(self.num_blocks)
        self.in_flight = None
        self.sequences = []
        self.waited = {}

    def arrive(self):
        rng = self.rng
        prompt = [rng.randrange(2) for _ in range(rng.choice([1, 3, 5, 8, 9, 21]))]
        sequence = Sequence(
            number=len(self.sequences),
            prompt=prompt,
            max_new_tokens=rng.choice([1, 2, 7, 12]),
            is_synchronous=rng.random() < 0.1,
        )
        self.sequences.append(sequence)
        self.scheduler.add(sequence)

    def cancel(self):
        self.scheduler.finish(self.rng.choice(self.sequences[-9:]), FinishReason.CANCELLED)

    def step(self):
        step = self.scheduler.schedule()
        self.check(step)
        tables = [
            (list(piece.sequence.blocks), piece.sequence.slot, list(piece.sequence.known()))
            for piece in step.pieces
        ]
        if self.in_flight:
            before, drawn = self.in_flight
            for piece, tokens in zip(before.pieces, drawn, strict=True):
                self.scheduler.commit(piece, tokens)
        self.in_flight = (step, self.device.run(step, tables)) if step.pieces else None
        return step

    def check(self, step):
        config = self.config
        assert step.num_tokens <= config.token_budget
        prompts = [piece for piece in step.pieces if not piece.is_decode]
        assert len(prompts) <= config.max_prompts
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
        if split and context < self.config.max_context:
            assert step.num_tokens == self.config.token_budget
        assert len(split) <= 1, "at most one prompt is cut a step"

    def drain(self, limit=2000):
        for _ in range(limit):
            self.step()
            if not self.scheduler.has_work and self.in_flight is None:
                return
        raise AssertionError("deadlock")


CASES = [
    dict(),
    dict(admission="growth"),
    dict(policy="prefill_first"),
    dict(use_prefix_cache=False, admission="growth", steps_a_launch=3),
    dict(steps_a_launch=2),
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_random_loads_end_with_every_token_right(changes):
    """Budget and blocks hold at each step, nothing starves, each context is the sequence's own."""
    for seed in range(12):
        rng = random.Random(seed)
        load = Load(dataclasses.replace(SMALL, **changes), rng.choice([8, 9, 14, 40]), rng)
        for _ in range(300):
            if rng.random() < 0.25:
                load.arrive()
            if rng.random() < 0.05 and load.sequences:
                load.cancel()
            if rng.random() < 0.01:
                load.scheduler.preempt_all() if load.in_flight is None else None
            load.step()
        load.drain()
        for sequence in load.sequences:
            assert sequence.status is Status.FINISHED
            wanted = reference(sequence.prompt, sequence.max_new_tokens)
            if sequence.finish_reason is FinishReason.LENGTH:
                assert sequence.outputs == wanted
            else:
                assert sequence.outputs == wanted[: len(sequence.outputs)]
        assert load.blocks.num_held == 0
        assert load.blocks.num_free == load.num_blocks


@pytest.mark.long
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_a_million_steps(changes):
    rng = random.Random(1)
    load = Load(dataclasses.replace(SMALL, **changes), 12, rng)
    for _ in range(250_000):
        if rng.random() < 0.2 and load.scheduler.num_waiting < 50:
            load.arrive()
        if rng.random() < 0.02 and load.sequences:
            load.cancel()
        load.step()
    load.drain()
    assert load.blocks.num_held == 0


def make(num_blocks=40, **changes):
    config = dataclasses.replace(SMALL, **changes)
    return Scheduler(config, BlockPool(num_blocks, BLOCK))


def run(scheduler, token=1):
    """Plans a step and commits `token` wherever one is drawn."""
    step = scheduler.schedule()
    for piece in step.pieces:
        scheduler.commit(piece, [token] if piece.is_drawing else [])
    return step


def test_prompts_are_split_and_fused_to_the_budget():
    scheduler = make()
    for number, length in enumerate((3, 11, 2)):
        scheduler.add(Sequence(number, [number] * length, 4))
    planned = [
        [(piece.sequence.number, piece.start, piece.count) for piece in run(scheduler).pieces]
        for _ in range(3)
    ]
    assert planned == [
        [(0, 0, 3), (1, 0, 5)],
        [(0, 3, 1), (1, 5, 6), (2, 0, 1)],
        [(0, 4, 1), (1, 11, 1), (2, 1, 1)],
    ]


def test_the_baseline_lets_decoding_wait_for_prompts():
    scheduler = make(policy="prefill_first")
    scheduler.add(Sequence(0, [0] * 3, 4))
    run(scheduler)
    scheduler.add(Sequence(1, [1] * 11, 4))
    planned = [[piece.sequence.number for piece in run(scheduler).pieces] for _ in range(3)]
    assert planned == [[1], [1], [0, 1]]


def test_higher_priority_comes_first():
    scheduler = make(max_sequences=1)
    for number, priority in enumerate((0, 0, 5)):
        scheduler.add(Sequence(number, [1], 1, priority=priority))
    order = [run(scheduler).pieces[0].sequence.number for _ in range(3)]
    assert order == [2, 0, 1]


def test_the_newest_gives_its_blocks_up_and_is_computed_again():
    """Its prompt and tokens are as before, its count of new tokens too."""
    scheduler = make(num_blocks=4, admission="growth", use_prefix_cache=False)
    for number in (0, 1):
        scheduler.add(Sequence(number, [number] * 7, 8))
    preempted = []
    while scheduler.has_work:
        preempted += run(scheduler).preempted
    assert [sequence.number for sequence in preempted] == [1]
    assert len(preempted[0].outputs) == 8
    assert len(preempted[0].prompt) == 7


def test_a_shared_prefix_is_computed_once_and_admits_more():
    scheduler = make(num_blocks=6)
    prompt = [3] * 9
    scheduler.add(Sequence(0, prompt, 4))
    run(scheduler), run(scheduler)
    second = Sequence(1, prompt, 4)
    scheduler.add(second)
    step = run(scheduler)
    assert second.num_cached == 8
    assert [piece.count for piece in step.pieces] == [1, 1]
    assert second.blocks[:2] == step.pieces[0].sequence.blocks[:2]
    assert scheduler.blocks.num_held == 4  # 2 shared, 1 each


def test_another_salt_or_other_weights_share_nothing():
    scheduler = make()
    scheduler.add(Sequence(0, [3] * 9, 1))
    run(scheduler), run(scheduler)
    salted = Sequence(1, [3] * 9, 1, salt="adapter")
    scheduler.add(salted)
    run(scheduler), run(scheduler)
    scheduler.preempt_all()
    later = Sequence(2, [3] * 9, 1)
    scheduler.add(later)
    run(scheduler)
    assert (salted.num_cached, later.num_cached) == (0, 0)


def test_a_deadline_ends_a_sequence_that_runs_and_one_that_waits():
    scheduler = make(max_sequences=1)
    sequences = [Sequence(number, [1], 9, deadline_s=5.0) for number in (0, 1)]
    for sequence in sequences:
        scheduler.add(sequence)
    assert not scheduler.schedule(4.9).expired
    assert scheduler.schedule(5.0).expired == tuple(sequences)
    assert {sequence.finish_reason for sequence in sequences} == {FinishReason.TIMEOUT}
    assert not scheduler.has_work


def test_what_never_fits_is_refused():
    expected = "blocks needed <= blocks, here 5 <= 4"
    with pytest.raises(InputError, match=expected):
        make(num_blocks=4).add(Sequence(0, [1] * 10, 8))
    with pytest.raises(InputError, match="max_sequences <= token_budget = 8"):
        dataclasses.replace(SMALL, max_sequences=9)
