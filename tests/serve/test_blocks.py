"""Which blocks of the prefix cache are forgotten first, on the device and in the host's memory."""

import pytest

from jaxscale.serve.blocks import BlockPool, Move, PrefixChain
from jaxscale.types import RunError


def known(pool, *digests):
    """Blocks that hold a prefix of these digests and that nobody holds any more."""
    blocks = pool.take((), len(digests))
    for block, digest in zip(blocks, digests, strict=True):
        pool.register(block, digest)
    pool.release(blocks)
    return blocks


def is_known(pool, *digests):
    return [bool(pool.find([digest])) for digest in digests]


def test_the_least_recently_used_prefix_is_forgotten_first():
    pool = BlockPool(4, 8)
    for digest in (b"a", b"b", b"c", b"d"):
        known(pool, digest)
    # Whoever finds a prefix uses it.
    pool.release(pool.take(pool.find([b"a"]), 0))
    held = pool.take((), 2)
    assert is_known(pool, b"a", b"b", b"c", b"d") == [True, False, False, True]
    pool.release(held)
    pool.take((), 3)
    assert is_known(pool, b"a", b"d") == [True, False]


def test_of_one_prefix_its_end_is_forgotten_first_and_its_beginning_stays_of_use():
    pool = BlockPool(3, 8)
    known(pool, b"a", b"ab", b"abc")
    pool.take((), 1)
    assert is_known(pool, b"a", b"ab", b"abc") == [True, True, False]
    assert len(pool.find([b"a", b"ab", b"abc"])) == 2


def test_blocks_without_a_prefix_are_taken_before_any_is_forgotten_and_held_ones_never():
    pool = BlockPool(4, 8)
    (first,) = known(pool, b"a")
    (shared,) = pool.take(pool.find([b"a"]), 0)
    known(pool, b"b")
    new = pool.take((), 2)
    assert is_known(pool, b"a", b"b") == [True, True]
    assert pool.take((), 1) and is_known(pool, b"a", b"b") == [True, False]
    assert shared == first and shared not in new
    with pytest.raises(RunError, match="1 blocks of the cache are wanted, 0 are free"):
        pool.take((), 1)


def test_the_host_forgets_the_least_recently_used_too():
    pool = BlockPool(1, 8, num_places=2)
    for digest in (b"a", b"b", b"c"):
        (block,) = known(pool, digest)
    assert [move.is_spill for move in pool.take_moves()] == [True, True]  # a and b
    (block,) = pool.take((), 1)  # c goes, in the place of a
    assert pool.load([block], [b"a"]) == 0
    assert pool.load([block], [b"b"]) == 1
    pool.release([block])
    spill, load = pool.take_moves()
    assert (spill.is_spill, load.is_spill) == (True, False)
    pool.release(pool.take((), 1))  # b is there already, and has been used later than c
    known(pool, b"d")
    pool.take((), 1)
    assert pool.take_moves() == [Move(block, spill.place, is_spill=True)], "d goes for c"


def test_what_comes_back_from_the_host_is_used_there_too():
    pool = BlockPool(2, 8, num_places=2)
    known(pool, b"a")
    known(pool, b"b")
    first, second = pool.take((), 2)
    assert pool.load([first], [b"a"]) == 1
    pool.register(second, b"c")
    pool.release([second])
    pool.take((), 1)
    assert [pool.load([second], [digest]) for digest in (b"a", b"b", b"c")] == [1, 0, 1]


def test_what_is_known_of_a_blocks_tokens_is_forgotten_with_it():
    pool = BlockPool(1, 8)
    known(pool, b"a")
    pool.keep_scores(b"a", [1, 2])
    pool.keep_scores(b"b", [3])
    assert (pool.scores_of(b"a"), pool.scores_of(b"b")) == ([1, 2], None)
    pool.take((), 1)
    assert pool.scores_of(b"a") is None


def test_a_digest_is_of_all_tokens_before_its_end_and_of_the_salt():
    one, other = PrefixChain(2), PrefixChain(2)
    assert one.digests([1, 2, 3, 4, 5]) == other.digests([1, 2, 3, 4])
    assert len(one.digests([1, 2, 3, 4, 5])) == 2
    assert PrefixChain(2).digests([9, 2, 3, 4])[1] != other.digests([1, 2, 3, 4])[1]
    salted = [PrefixChain(2, salt).digests([1, 2])[0] for salt in ("", "a", "b")]
    assert len(set(salted)) == 3
