"""Trees by path: names, masks, and a split that merges back."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.types import InputError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: int
    params: dict


PARAMS = {"embed": 1, "layers": [{"attention": {"q": 2, "bias": 3}}, {"mlp": {"up": 4}}]}


def test_paths_go_through_dicts_lists_and_dataclasses():
    paths = {
        "step": 0,
        "params/embed": 1,
        "params/layers/0/attention/bias": 3,
        "params/layers/0/attention/q": 2,
        "params/layers/1/mlp/up": 4,
    }
    assert tree.flatten(State(step=0, params=PARAMS)) == paths


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="a/b"):
        tree.flatten({"a": {"b": 1}, "a/b": 2})


def test_map_with_path_passes_every_tree():
    mapped = tree.map_with_path(lambda path, a, b: f"{path}={a + b}", PARAMS, PARAMS)
    assert mapped["layers"][0]["attention"]["q"] == "layers/0/attention/q=4"


def test_mask_matches_whole_paths():
    assert tree.flatten(tree.mask(PARAMS, "embed|.*/bias")) == {
        "embed": True,
        "layers/0/attention/bias": True,
        "layers/0/attention/q": False,
        "layers/1/mlp/up": False,
    }
    assert not any(tree.flatten(tree.mask(PARAMS, "layers")).values())


def test_what_is_selected_merges_with_the_rest():
    chosen, rest = tree.select(PARAMS, r"layers/\d+/.*"), tree.select(PARAMS, "embed")
    assert tree.flatten(chosen).keys() == tree.flatten(PARAMS).keys() - {"embed"}
    assert tree.merge(chosen, rest) == tree.merge(rest, chosen) == PARAMS


def test_the_first_tree_wins_where_both_have_a_leaf():
    doubled = jax.tree.map(lambda x: 2 * x, tree.select({"a": 1, "b": 2}, "a"))
    assert tree.merge(doubled, {"a": 1, "b": 2}) == {"a": 2, "b": 2}


def test_a_split_can_be_differentiated():
    params = {"a": np.float32(2.0), "b": np.float32(5.0)}
    trained, frozen = tree.select(params, "a"), tree.select(params, "b")

    def loss(trained):
        merged = tree.merge(trained, frozen)
        return merged["a"] ** 2 * merged["b"]

    assert jax.grad(loss)(trained) == {"a": 20.0, "b": None}


def test_a_bad_pattern_is_named():
    with pytest.raises(InputError, match=r"given '\(', expected a regular expression"):
        tree.mask(PARAMS, "(")
