"""The parameter table and the initial draws."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxscale import tree
from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import (
    abstract_params,
    count_parameters,
    init_params,
    parameter_table,
)
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.rules import make_specs

CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=4,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=64,
    max_length=16,
    moe_pattern=(True,),
    num_experts=4,
    expert_dim=32,
    use_bias=True,
    norm="layernorm",
    activation="gelu",
)
GOLDEN = {
    "embedding/tokens": 32.416954,
    "layers/0/attention/q": 66.058319,
    "layers/0/moe/experts/down": 92.620453,
}
init = functools.partial(init_params, CONFIG, dtype="float32")


@pytest.fixture(scope="module")
def params():
    return jax.jit(init)(jax.random.key(3))


def test_the_tree_is_the_table(params):
    table = tree.flatten(parameter_table(CONFIG))
    assert {path: leaf.shape for path, leaf in tree.flatten(params).items()} == {
        path: entry.shape for path, entry in table.items()
    }
    assert jax.tree.map(
        lambda s: (s.shape, s.dtype), abstract_params(CONFIG, "float32")
    ) == jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert all(len(entry.dims) == len(entry.shape) for entry in table.values())
    assert count_parameters(CONFIG)[0] == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_draws_have_their_deviation(params):
    flat = tree.flatten(params)
    for path, entry in tree.flatten(parameter_table(CONFIG)).items():
        if entry.std:
            assert flat[path].std() == pytest.approx(entry.std, rel=0.15), path
            assert abs(flat[path].mean()) < entry.std / 4, path
        else:
            assert (flat[path] == entry.mean).all(), path
    assert tree.flatten(parameter_table(CONFIG))["layers/0/moe/experts/down"].std == pytest.approx(
        0.02 / 8**0.5
    )


def test_no_two_leaves_or_layers_share_a_draw(params):
    """Every number of every normal leaf occurs once, near enough."""
    flat = tree.flatten(params)
    drawn = [
        flat[path] / entry.std
        for path, entry in tree.flatten(parameter_table(CONFIG)).items()
        if entry.std
    ]
    numbers = np.concatenate([np.ravel(leaf) for leaf in drawn])
    assert len(np.unique(numbers)) > 0.98 * len(numbers)


def test_draws_do_not_depend_on_the_mesh(params):
    config = MeshConfig(data=2, expert=2, tensor=2, zero=3)
    mesh = make_mesh(config)
    specs = make_specs(parameter_table(CONFIG), config).parameters
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    sharded = jax.jit(init, out_shardings=shardings)(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, sharded, params)


def test_a_leaf_does_not_depend_on_the_others(params):
    """A model without biases and head starts from the same matrices."""
    plain = ModelConfig(
        **{field: getattr(CONFIG, field) for field in CONFIG.__dataclass_fields__}
        | {"use_bias": False, "is_tied": True}
    )
    other = tree.flatten(
        jax.jit(functools.partial(init_params, plain, dtype="float32"))(jax.random.key(3))
    )
    flat = tree.flatten(params)
    assert set(other) < set(flat)
    for path, leaf in other.items():
        np.testing.assert_array_equal(leaf, flat[path])


def test_another_seed_gives_another_model(params):
    other = jax.jit(init)(jax.random.key(4))
    assert (
        other["layers"]["0"]["attention"]["q"] != params["layers"]["0"]["attention"]["q"]
    ).mean() > 0.99


def test_draws_are_golden(params):
    """Sums of absolute values, to 1e-5: a change of them changes every run that starts from a seed."""
    sums = {
        path: float(np.abs(leaf).sum())
        for path, leaf in tree.flatten(params).items()
        if path in GOLDEN
    }
    assert sums == pytest.approx(GOLDEN, rel=1e-5)
