"""The shuffle without a table: a bijection, the same on every machine, another one for each key."""

import numpy as np
import pytest

from jaxscale.data.permutation import permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 1025])
def test_every_index_is_hit_once(size):
    images = permute(np.arange(size), size, seed=1, stream=0, epoch=0)
    assert sorted(images) == list(range(size))


def test_a_part_is_permuted_as_in_the_whole():
    key = {"seed": 1, "stream": 2, "epoch": 3}
    whole = permute(np.arange(100), 100, **key)
    part = permute(np.array([7, 50]), 100, **key)
    assert part.tolist() == whole[[7, 50]].tolist()


def test_each_part_of_the_key_matters():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (-1, 0, 0)]
    images = set()
    for seed, stream, epoch in keys:
        image = permute(np.arange(50), 50, seed=seed, stream=stream, epoch=epoch)
        images.add(tuple(image.tolist()))
    assert len(images) == len(keys)


def test_neighbours_are_scattered():
    """Over 1600 keys each image, and the distance of two, is uniform.

    Chi-squared stays within five standard deviations of its mean.
    """
    pair = np.array([3, 4])
    images = np.array([permute(pair, 16, seed=seed, stream=0, epoch=0) for seed in range(1600)])
    distances = (images[:, 1] - images[:, 0]) % 16
    num_distances = np.bincount(distances)[1:]  # never 0: the images differ
    for counts in (np.bincount(images[:, 0]), np.bincount(images[:, 1]), num_distances):
        freedom = len(counts) - 1
        expected = 1600 / len(counts)
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5


def test_values_are_fixed_for_ever():
    """Resumed runs depend on them."""
    assert permute(np.arange(8), 8, seed=0, stream=0, epoch=0).tolist() == [4, 6, 2, 5, 7, 1, 0, 3]
    assert permute(np.arange(3), 10**12, seed=7, stream=1, epoch=2).tolist() == [
        235997771040,
        653531570428,
        374200697587,
    ]
