"""The scheduler under random loads, with a simulated device that knows what its cache holds."""

import dataclasses
import random
import weakref

import pytest

from jaxscale.serve.blocks import BlockPool
from jaxscale.serve.scheduler import Scheduler
from jaxscale.serve.sequences import FinishReason, Sequence
from jaxscale.types import InputError
from tests.serve.simulation import BLOCK, CASES, SMALL, Load


@pytest.mark.parametrize("num_places", [0, 12])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_random_loads_end_with_every_token_right(changes, num_places):
    """Budget and blocks hold at each step, nothing starves, each context is the sequence's own."""
    for seed in range(3):
        rng = random.Random(seed)
        config, num_blocks = dataclasses.replace(SMALL, **changes), rng.choice([8, 9, 14, 40])
        load = Load(config, num_blocks, rng, num_places)
        load.run(300)
        load.drain()
        assert (load.num_loaded > 0) <= (num_places > 0)


@pytest.mark.long
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_a_quarter_of_a_million_steps(changes):
    load = Load(dataclasses.replace(SMALL, **changes), 12, random.Random(1), 20)
    load.run(30_000)
    load.drain()
    assert load.num_loaded > 0 or changes.get("use_prefix_cache") is False


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


def test_sequences_of_one_prompt_compute_it_once_in_the_same_step():
    scheduler = make(token_budget=16)
    for number in range(3):
        scheduler.add(Sequence(number, [3] * 9, 4))
    step = run(scheduler)
    assert [(piece.start, piece.count) for piece in step.pieces] == [(0, 9), (8, 1), (8, 1)]
    assert scheduler.blocks.num_held == 2 + 3


def test_drafts_end_where_keys_become_others_and_where_the_others_tokens_begin():
    """A switch length of LongRoPE, the tokens that are left, and a token for each sequence."""
    scheduler = make(token_budget=8, max_extra=8)
    switched = Sequence(0, [1] * 5, 20, switch_lengths=(8,), is_synchronous=True)
    short = Sequence(1, [2] * 2, 4, is_synchronous=True)
    for sequence in (switched, short):
        scheduler.add(sequence)
    run(scheduler)
    for sequence in (switched, short):
        sequence.drafts = [3] * 9
    first, second = run(scheduler).pieces
    assert (len(first.drafts), len(second.drafts)) == (2, 2)
    assert first.count + second.count <= 8
    many = make(token_budget=8, max_extra=8)
    for number in range(3):
        many.add(Sequence(number, [number], 20, is_synchronous=True))
    run(many)
    for sequence in many.running:
        sequence.drafts = [3] * 9
    assert [piece.count for piece in run(many).pieces] == [6, 1, 1]


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


@pytest.mark.parametrize("num_blocks", [40, 4], ids=["run", "wait"])
def test_what_has_ended_is_not_kept_until_its_deadline(num_blocks):
    """Of cancelled ones too, behind one that waits."""
    scheduler = make(num_blocks=num_blocks)
    first = Sequence(0, [1] * 9, 7)
    scheduler.add(first)
    run(scheduler)
    known = weakref.WeakSet()
    for number in range(1, 1001):
        sequence = Sequence(number, [number] * 9, 2, deadline_s=1e9)
        known.add(sequence)
        scheduler.add(sequence)
        scheduler.finish(sequence, FinishReason.CANCELLED)
    del sequence
    assert len(known) < 200
    last = Sequence(1001, [2] * 9, 2, deadline_s=5.0)
    scheduler.add(last)
    assert scheduler.schedule(5.0).expired == (last,)


def test_what_never_fits_is_refused():
    expected = "blocks needed <= blocks, here 5 <= 4"
    with pytest.raises(InputError, match=expected):
        make(num_blocks=4).add(Sequence(0, [1] * 10, 8))
    with pytest.raises(InputError, match="max_sequences <= token_budget = 8"):
        dataclasses.replace(SMALL, max_sequences=9)
