"""Mixtures: proportions, evenness, seeks."""

import numpy as np
import pytest

from jaxscale.data.mixture import PERIOD, Mixture
from jaxscale.types import InputError

WEIGHTS = (5.0, 3.0, 0.1, 1.9)


def test_every_stretch_holds_each_share_to_about_a_row():
    owners = Mixture(WEIGHTS, seed=3).sources(np.arange(2 * PERIOD))
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    served = np.cumsum(owners[:, None] == np.arange(4), axis=0)
    ideal = np.arange(1, 2 * PERIOD + 1)[:, None] * shares
    assert np.abs(served - ideal).max() < 2.5
    assert np.abs((served[1000:] - served[:-1000]) - 1000 * shares).max() < 4.5


def test_positions_count_earlier_rows_of_the_same_source():
    mixture = Mixture(WEIGHTS, seed=3)
    rows = np.arange(PERIOD + 500)
    owners, positions = mixture.sources(rows), mixture.positions(rows)
    for source in range(4):
        assert positions[owners == source].tolist() == list(
            range(np.count_nonzero(owners == source))
        )
    for row in (0, 1, 777, PERIOD, PERIOD + 499):
        assert mixture.served(row) == np.bincount(owners[:row], minlength=4).tolist()
    far = 10**12 + 7
    assert (
        mixture.served(far + 1)[mixture.sources(np.array([far]))[0]]
        == mixture.positions(np.array([far]))[0] + 1
    )


def test_seed_moves_the_phases():
    rows = np.arange(200)
    assert Mixture(WEIGHTS, 0).sources(rows).tolist() != Mixture(WEIGHTS, 1).sources(rows).tolist()
    assert Mixture((1.0,), 5).positions(rows).tolist() == rows.tolist()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, 1e-9)])
def test_bad_weights_are_named(weights):
    with pytest.raises(InputError, match=r"DataConfig\.weights"):
        Mixture(weights, 0)
