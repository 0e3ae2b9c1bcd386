"""Loads by domain: what they add up to, and how alike two domains are."""

import numpy as np
import pytest

from jaxscale.evaluate.routing import routing_table, shares, similarity
from jaxscale.types import InputError

LOADS = {"code": np.array([[3.0, 1.0], [2.0, 2.0]]), "prose": np.array([[0.0, 8.0], [5.0, 5.0]])}


def test_shares_are_of_a_layer():
    np.testing.assert_allclose(shares(LOADS["code"]), [[0.75, 0.25], [0.5, 0.5]])


def test_a_layer_without_choices_has_no_shares():
    with pytest.raises(InputError, match="load"):
        shares(np.array([[1.0, 1.0], [0.0, 0.0]]))


def test_similarity_is_the_cosine_of_each_layer():
    found = similarity(LOADS)
    apart = 0.25 / np.hypot(0.75, 0.25)
    np.testing.assert_allclose(found, [[[1, apart], [apart, 1]], np.ones((2, 2))])


def test_the_table_has_a_row_a_domain():
    rows = routing_table(LOADS, layer=0).splitlines()
    assert rows[0] == "| domain | 0 | 1 |"
    assert rows[2:] == ["| code | 75.0% | 25.0% |", "| prose | 0.0% | 100.0% |"]
