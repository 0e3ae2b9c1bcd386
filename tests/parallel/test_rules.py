"""Where each parameter, gradient and optimizer leaf lives, and what ZeRO saves."""

import math

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale import tree
from jaxscale.models.config.facts import from_flat
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.rules import make_specs, mirror

FIELDS = dict(
    vocab_size=64,
    num_layers=4,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_length=16,
    moe_pattern=(False, True),
    num_experts=4,
    expert_dim=32,
    num_dense_prefix=2,
)
MODEL = from_flat(**FIELDS)
BIASES = from_flat(**FIELDS, use_bias=True)
SIZES = dict(data=2, expert=2, tensor=2)


def specs_by_path(role, model=MODEL, **sizes):
    return tree.flatten(getattr(make_specs(parameter_table(model), MeshConfig(**sizes)), role))


@pytest.mark.parametrize(
    "path, spec",
    [
        ("embedding/tokens", ("tensor", None)),
        ("head/weights", ("tensor", None)),
        ("layers/0/attention/q", ("pipeline", None, "tensor", None)),
        ("layers/0/attention/k", ("pipeline", None, "tensor", None)),
        ("layers/0/attention/o", ("pipeline", "tensor", None, None)),
        ("layers/0/attention/q_bias", ("pipeline", "tensor", None)),
        ("layers/0/attention/o_bias", ("pipeline", None)),
        ("layers/0/attention/norm/scale", ("pipeline", None)),
        ("layers/0/ffn/down", ("pipeline", "tensor", None)),
        ("layers/1/moe/experts/up", ("pipeline", "expert", None, "tensor")),
        ("layers/1/moe/experts/down", ("pipeline", "expert", "tensor", None)),
        ("layers/1/moe/router", ("pipeline", None, None)),
        ("prefix/1/ffn/up", (None, "tensor")),
        ("final_norm/scale", (None,)),
    ],
)
def test_dense_rules(path, spec):
    assert specs_by_path("parameters", BIASES, **SIZES)[path] == PartitionSpec(*spec)


@pytest.mark.parametrize(
    "path, spec",
    [
        ("embedding/tokens", ("tensor", "data")),
        ("layers/0/attention/q", ("pipeline", "data", "tensor", None)),
        ("layers/0/attention/q_bias", ("pipeline", "tensor", "data")),
        ("layers/1/moe/experts/up", ("pipeline", "expert", "data", "tensor")),
        ("layers/1/moe/router", ("pipeline", "data", None)),
        ("final_norm/scale", ("data",)),
    ],
)
def test_zero_takes_the_outermost_free_dim(path, spec):
    assert specs_by_path("optimizer", BIASES, **SIZES)[path] == PartitionSpec(*spec)


@pytest.mark.parametrize(
    "path, by_layers, gathered",
    [
        (
            "layers/0/ffn/down",
            (("pipeline", "data"), "tensor", None),
            ("pipeline", ("tensor", "data"), None),
        ),
        ("layers/1/moe/router", (("pipeline", "data"), None, None), ("pipeline", "data", None)),
        ("embedding/tokens", (("tensor", "data"), None), (("tensor", "data"), None)),
        ("prefix/1/ffn/down", (("tensor", "data"), None), (("tensor", "data"), None)),
    ],
)
def test_zero_cuts_whole_layers_unless_it_gathers_them_one_by_one(path, by_layers, gathered):
    """An axis of one device leaves a dim free."""
    model = from_flat(**FIELDS | dict(num_layers=6))
    for zero, spec in ((1, by_layers), (2, by_layers), (3, gathered)):
        assert specs_by_path("optimizer", model, data=2, zero=zero)[path] == PartitionSpec(*spec)


def test_zero_leaves_the_layers_of_padded_chunks_whole():
    """The stored stack is longer than the dim that would be cut."""
    sizes = dict(data=2, zero=2, num_chunks=3, schedule="interleaved")
    specs = specs_by_path("optimizer", from_flat(**FIELDS | dict(num_layers=10)), **sizes)
    assert specs["layers/0/ffn/down"] == PartitionSpec("pipeline", ("tensor", "data"), None)


def test_a_leaf_without_a_free_dim_that_divides_stays_whole():
    specs = specs_by_path("parameters", BIASES, **SIZES, zero=3)
    assert specs["layers/0/ffn/up_bias"] == PartitionSpec("pipeline", "tensor")
    specs = specs_by_path("parameters", data=3, zero=3)
    assert specs["final_norm/scale"] == PartitionSpec(None)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_each_level_shards_one_role_more(zero):
    dense = specs_by_path("parameters", **SIZES, zero=0)
    for level, role in ((1, "optimizer"), (2, "gradients"), (3, "parameters")):
        specs = specs_by_path(role, **SIZES, zero=zero)
        assert (specs == dense) == (zero < level), role
        assert all("data" in spec for spec in specs.values()) == (zero >= level), role


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bytes_on_a_device(zero):
    """Read off the arrays' shards: 4 bytes a parameter, on as many devices as share it."""
    config = MeshConfig(**SIZES, zero=zero)
    table = parameter_table(MODEL)
    mesh, specs = make_mesh(config), make_specs(table, config)
    unsharded = specs_by_path("parameters", **SIZES, zero=0)
    num_bytes = 0
    for path, entry in tree.flatten(table).items():
        num_shards = 2 ** sum(axis in unsharded[path] for axis in ("tensor", "expert"))
        num_bytes += 4 * math.prod(entry.shape) // num_shards

    def put(leaf, spec):
        return jax.device_put(np.zeros(leaf.shape, "float32"), NamedSharding(mesh, spec))

    for level, role in ((1, specs.optimizer), (2, specs.gradients), (3, specs.parameters)):
        arrays = jax.tree.leaves(jax.tree.map(put, table, role))
        on_first = sum(array.addressable_shards[0].data.nbytes for array in arrays)
        assert on_first == (num_bytes // 2 if zero >= level else num_bytes)


def test_optimizer_leaves_live_where_their_parameter_does():
    params = abstract_params(parameter_table(MODEL), "float32")
    specs = make_specs(parameter_table(MODEL), MeshConfig(**SIZES, zero=1)).optimizer
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    mirrored = mirror(state, params, specs, PartitionSpec())
    assert mirrored[0].mu == mirrored[0].nu == specs
    assert mirrored[0].count == PartitionSpec()
