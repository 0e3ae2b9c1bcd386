"""The parameter table and the initial draws."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxscale import tree
from jaxscale.models.config.facts import from_flat
from jaxscale.models.parameters import (
    abstract_params,
    count_parameters,
    in_order_of_use,
    init_params,
    parameter_table,
)
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.rules import make_specs
from jaxscale.types import Role
from tests.models.examples import MODELS

SHAPE = dict(
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
    norm="layernorm",
    activation="gelu",
)
CONFIG = from_flat(**SHAPE, use_bias=True)
TABLE = parameter_table(CONFIG)
GOLDEN = {
    "embedding/tokens": 32.416954,
    "layers/0/attention/q": 66.058319,
    "layers/0/moe/experts/down": 92.620453,
}
init = functools.partial(init_params, TABLE, dtype="float32")


@pytest.fixture(scope="module")
def params():
    return jax.jit(init)(jax.random.key(3))


def test_the_tree_is_the_table(params):
    table, flat = tree.flatten(TABLE), tree.flatten(params)
    assert {path: leaf.shape for path, leaf in flat.items()} == {
        path: entry.shape for path, entry in table.items()
    }
    form = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), abstract_params(TABLE, "float32")) == form
    assert all(len(entry.dims) == len(entry.shape) for entry in table.values())
    assert count_parameters(TABLE)[0] == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_draws_have_their_deviation(params):
    flat = tree.flatten(params)
    for path, entry in tree.flatten(TABLE).items():
        if entry.std:
            assert flat[path].std() == pytest.approx(entry.std, rel=0.15), path
            assert abs(flat[path].mean()) < entry.std / 4, path
        else:
            assert (np.asarray(flat[path]) == entry.mean).all(), path
    down = tree.flatten(TABLE)["layers/0/moe/experts/down"]
    assert down.std == pytest.approx(0.02 / 8**0.5)


def test_no_two_leaves_or_layers_share_a_draw(params):
    """Every number of every normal leaf occurs once, near enough."""
    flat, table = tree.flatten(params), tree.flatten(TABLE)
    drawn = [np.ravel(flat[path]) / entry.std for path, entry in table.items() if entry.std]
    numbers = np.concatenate(drawn)
    assert len(np.unique(numbers)) > 0.98 * len(numbers)


def test_draws_do_not_depend_on_the_mesh(params):
    config = MeshConfig(data=2, expert=2, tensor=2, zero=3)
    mesh = make_mesh(config)
    specs = make_specs(TABLE, config).parameters
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    sharded = jax.jit(init, out_shardings=shardings)(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, sharded, params)


def test_a_leaf_does_not_depend_on_the_others(params):
    """A model without biases and head starts from the same matrices."""
    plain = parameter_table(from_flat(**SHAPE, is_tied=True))
    run = jax.jit(functools.partial(init_params, plain, dtype="float32"))
    other, flat = tree.flatten(run(jax.random.key(3))), tree.flatten(params)
    assert set(other) < set(flat)
    for path, leaf in other.items():
        np.testing.assert_array_equal(leaf, flat[path])


def test_another_seed_gives_another_model(params):
    q = params["layers"]["0"]["attention"]["q"]
    other = jax.jit(init)(jax.random.key(4))["layers"]["0"]["attention"]["q"]
    assert (q != other).mean() > 0.99


def test_draws_are_golden(params):
    """Sums of absolute values, to 1e-5: a change of them changes every run from a seed."""
    flat = tree.flatten(params)
    sums = {path: float(np.abs(flat[path]).sum()) for path in GOLDEN}
    assert sums == pytest.approx(GOLDEN, rel=1e-5)


# Roles


def paths_of(config, role):
    return {path for path, entry in in_order_of_use(parameter_table(config)) if entry.role == role}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_the_role_of_its_shape(name):
    """Matrices have two dims or more without the stack's, what is added or scales one or two."""
    config = MODELS[name]
    table = tree.flatten(parameter_table(config))
    for path, entry in table.items():
        dims = entry.dims.removeprefix("L") if entry.is_stacked else entry.dims
        is_vector = entry.role in (Role.NORM, Role.BIAS, Role.LOGIT_BIAS)
        assert dims in ("D", "F", "H", "NH", "KH", "V") if is_vector else len(dims) >= 2, path
        assert entry.is_stacked is path.startswith("layers/"), path
        assert (entry.role == Role.EXPERT) is ("/experts/" in path), path
        assert (entry.role == Role.NORM) is (path.endswith("/scale") or "norm" in path), path


def test_roles_of_a_model_with_every_part():
    table = tree.flatten(parameter_table(MODELS["grin"]))
    assert table["head/weights"].role == Role.UNEMBEDDING
    assert table["head/bias"].role == Role.LOGIT_BIAS
    assert table["embedding/tokens"].role == Role.EMBEDDING
    assert table["layers/1/moe/router"].role == Role.ROUTER
    assert table["layers/0/attention/q_bias"].role == Role.BIAS
    assert table["layers/0/attention/o"].role == Role.MATRIX
    assert paths_of(MODELS["gpt2"], Role.POSITIONS) == {"embedding/positions"}


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_value_head_takes_the_place_of_the_unembedding(is_tied):
    config = dataclasses.replace(MODELS["grin"], is_tied=is_tied, use_value_head=True)
    table = tree.flatten(parameter_table(config))
    value = table["value_head/weights"]
    assert value.role == Role.VALUE and value.shape == (1, config.model_dim)
    assert value.std == value.mean == 0
    assert not [path for path in table if path.startswith("head/")]


def test_parts_that_a_configuration_lacks_have_no_parameters():
    """Biases of three projections of four; norms before, after, or both, and one where parallel."""
    biases = paths_of(MODELS["post_norms"], Role.BIAS)
    assert biases == {f"layers/1/attention/{name}_bias" for name in "qkv"}
    scales = {path for path in paths_of(MODELS["post_norms"], Role.NORM) if "attention" not in path}
    assert scales == {
        "layers/0/moe/norm_after/scale",
        "layers/1/ffn/norm/scale",
        "layers/1/ffn/norm_after/scale",
        "final_norm/scale",
    }
    side_by_side = paths_of(MODELS["side_by_side"], Role.NORM)
    assert not {path for path in side_by_side if "ffn" in path or "moe" in path}


def test_a_wide_model_of_mup_has_smaller_matrices_that_learn_more_slowly():
    """arXiv 2203.03466, table 8: variance and rate of hidden weights fall as 1 / m."""
    plain = dict(in_order_of_use(TABLE))
    wide = dict(in_order_of_use(parameter_table(dataclasses.replace(CONFIG, width_multiplier=4.0))))
    for path, parameter in plain.items():
        is_hidden = parameter.role in (Role.MATRIX, Role.EXPERT, Role.ROUTER)
        assert wide[path].std == (parameter.std / 2 if is_hidden else parameter.std), path
        assert wide[path].learning_rate_factor == (0.25 if is_hidden else 1.0), path
