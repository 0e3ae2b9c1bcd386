"""Boxes against plain indexing: what lies where, and what is written never or twice."""

import itertools
import random

import numpy as np
import pytest

from jaxscale.checkpoint.boxes import Merged, Placement, find_fault, flat_boxes
from jaxscale.types import InputError


def placed(part, starts, *, reads=None, sizes=None, steps=None, origin="a part"):
    zeros, ones = (0,) * len(starts), (1,) * len(starts)
    return Placement(part, reads or zeros, starts, sizes or part.shape, steps or ones, origin)


def number(shape):
    return np.arange(np.prod(shape)).reshape(shape)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2)])
def test_the_boxes_of_a_flat_range_are_its_elements_in_order(shape):
    whole = number(shape)
    size = whole.size
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        found = []
        for corner, sizes in flat_boxes(shape, start, stop):
            box = tuple(slice(a, a + n) for a, n in zip(corner, sizes))
            found += list(whole[box].reshape(-1))
        assert found == list(range(start, stop))
        assert len(flat_boxes(shape, start, stop)) <= max(1, 2 * len(shape) - 1)


def test_any_box_is_read_from_any_partition():
    draw = random.Random(0)
    whole = np.random.default_rng(0).normal(size=(6, 9))
    cuts = [(0, 2), (2, 6)], [(0, 4), (4, 5), (5, 9)]
    parts = []
    for (a, b), (c, d) in itertools.product(*cuts):
        padded = np.pad(whole[a:b, c:d], ((1, 0), (0, 2)))
        sizes = (b - a, d - c)
        parts.append(placed(padded, (a, c), reads=(1, 0), sizes=sizes, steps=(1, 1)))
    merged = Merged("w", whole.shape, whole.dtype, (tuple(parts),))
    for _ in range(50):
        rows, columns = (sorted(draw.choices(range(n + 1), k=2)) for n in whole.shape)
        box = slice(*rows), slice(*columns)
        np.testing.assert_array_equal(merged[box], whole[box])


def test_strided_rows_are_read_from_their_ranks():
    whole = number((7, 2))
    ranks = [whole[rank::3] for rank in range(3)]
    parts = [placed(part, (rank, 0), steps=(3, 1)) for rank, part in enumerate(ranks)]
    merged = Merged("w", whole.shape, whole.dtype, (tuple(parts),))
    for start, stop in itertools.combinations(range(8), 2):
        np.testing.assert_array_equal(merged[start:stop, 1:], whole[start:stop, 1:])


def test_a_part_may_be_one_element_of_a_stack():
    whole = number((2, 3, 2, 2))
    parts = []
    for index in itertools.product(range(2), range(3)):
        part = whole[index]
        parts.append(
            Placement(part, (0, 0), (*index, 0, 0), (1, 1, 2, 2), (1, 1, 1, 1), str(index))
        )
    merged = Merged("w", whole.shape, whole.dtype, (tuple(parts),))
    np.testing.assert_array_equal(merged[:], whole)
    np.testing.assert_array_equal(merged[1:2, 1:3, :, 1:], whole[1:2, 1:3, :, 1:])


def test_what_is_written_never_or_twice_is_found_as_counting_finds_it():
    """Random boxes of a small array; counting each element is the oracle."""
    draw = np.random.default_rng(1)
    shape = (3, 4)
    num_exact = 0
    for _ in range(300):
        count = np.zeros(shape, int)
        parts = []
        for number_of_part in range(draw.integers(1, 4)):
            starts = tuple(int(draw.integers(0, size)) for size in shape)
            sizes = tuple(int(draw.integers(1, n - a + 1)) for n, a in zip(shape, starts))
            if number_of_part == 0:
                starts, sizes = (0, 0), (int(draw.integers(1, 4)), 4)
            count[tuple(slice(a, a + n) for a, n in zip(starts, sizes))] += 1
            parts.append(placed(np.zeros(sizes), starts, origin=f"part {number_of_part}"))
        fault = find_fault(shape, parts)
        assert (fault is None) == bool((count == 1).all()), (fault, count)
        num_exact += fault is None
    assert num_exact, "no case was sound"


def test_a_fault_names_the_element_and_the_parts():
    half = np.zeros((2, 2))
    assert "nothing writes [2]" in find_fault((4, 2), [placed(half, (0, 0))])
    twice = [placed(half, (0, 0), origin="rank 0"), placed(half, (1, 0), origin="rank 1")]
    assert find_fault((3, 2), twice) == "rank 0 and rank 1 both write [1, 0]"
    assert "reaches to 3 in dim 0" in find_fault((2, 2), [placed(half, (1, 0), origin="x")])


def test_copies_that_differ_are_refused_and_means_are_taken():
    one, other = np.float32([1, 2, 3]), np.float32([1, 2, 5])
    copies = (placed(one, (0,), origin="rank 0"),), (placed(other, (0,), origin="rank 1"),)
    equal = Merged("w", (3,), np.dtype("f4"), copies)
    np.testing.assert_array_equal(equal[0:2], one[:2])
    with pytest.raises(InputError, match="w: given 'different values in rank 0 and rank 1'"):
        equal[:]
    mean = Merged("w", (3,), np.dtype("f4"), copies, "mean")
    np.testing.assert_array_equal(mean[:], np.float32([1, 2, 4]))


def test_a_part_that_begins_before_the_whole_is_a_fault():
    part = placed(np.zeros(3), (-1,))
    with pytest.raises(InputError, match="begins at -1 in dim 0"):
        Merged("w", (2,), part.part.dtype, ((part,),))
