"""Loads by domain: what they add up to, and how alike two domains are."""

import numpy as np
import pytest
from grin_study.routing import shares, similarity

from jaxscale.types import InputError

LOADS = {
    "code": np.array([[3.0, 1.0], [2.0, 2.0]]),
    "prose": np.array([[0.0, 8.0], [5.0, 5.0]]),
}


def test_shares_are_of_a_layer():
    found = shares(LOADS["code"])
    np.testing.assert_allclose(found[0], [0.75, 0.25])
    np.testing.assert_allclose(found[1], [0.5, 0.5])


def test_a_layer_without_choices_has_no_shares():
    load = np.array([[1.0, 1.0], [0.0, 0.0]])
    with pytest.raises(InputError, match="load"):
        shares(load)


def test_similarity_is_the_cosine_of_each_layer():
    apart = 0.25 / np.hypot(0.75, 0.25)
    first_layer, second_layer = similarity(LOADS)
    np.testing.assert_allclose(first_layer, [[1, apart], [apart, 1]])
    np.testing.assert_allclose(second_layer, 1)
