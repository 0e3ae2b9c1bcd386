"""Mixtures: proportions, evenness, seeks."""

import numpy as np
import pytest

from jaxscale.data.mixture import PERIOD, Mixture
from jaxscale.types import InputError

WEIGHTS = (5.0, 3.0, 0.1, 1.9)


def test_every_stretch_holds_each_share_to_about_a_row():
    sources = Mixture(WEIGHTS, seed=3).sources(np.arange(2 * PERIOD))
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    served = np.cumsum(sources[:, None] == np.arange(4), axis=0)
    ideal = np.arange(1, 2 * PERIOD + 1)[:, None] * shares
    assert np.abs(served - ideal).max() < 2.5
    assert np.abs((served[1000:] - served[:-1000]) - 1000 * shares).max() < 4.5


def test_positions_count_earlier_rows_of_the_same_source():
    mixture = Mixture(WEIGHTS, seed=3)
    rows = np.arange(PERIOD + 500)
    sources, positions = mixture.sources(rows), mixture.positions(rows)
    for source in range(4):
        found = positions[sources == source]
        assert found.tolist() == list(range(len(found)))
    for row in (0, 1, 777, PERIOD, PERIOD + 499):
        assert mixture.served(row) == np.bincount(sources[:row], minlength=4).tolist()
    far = np.array([10**12 + 7])
    (source,) = mixture.sources(far)
    assert mixture.served(int(far[0]) + 1)[source] == mixture.positions(far)[0] + 1


def test_seed_moves_the_phases():
    rows = np.arange(200)
    first, second = (Mixture(WEIGHTS, seed).sources(rows) for seed in (0, 1))
    assert first.tolist() != second.tolist()


def test_one_source_serves_every_row():
    rows = np.arange(200)
    assert Mixture((1.0,), 5).positions(rows).tolist() == rows.tolist()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, 1e-9)])
def test_bad_weights_are_named(weights):
    with pytest.raises(InputError, match=r"DataConfig\.weights"):
        Mixture(weights, 0)
