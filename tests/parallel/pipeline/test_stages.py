"""The stages' layout: lossless both ways, a stage's rows on its devices, misfits refused."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.parallel.mesh import PIPELINE, MeshConfig, make_mesh
from jaxscale.parallel.pipeline.stages import PADDING, StageLayout, to_canonical
from jaxscale.types import InputError

LAYOUTS = [
    StageLayout(4, 1),
    StageLayout(8, 4),
    StageLayout(7, 4),
    StageLayout(8, 2, 2),
    StageLayout(7, 2, 3),
    StageLayout(9, 2, 2, (3, 1, 4, 1)),
    StageLayout(6, 3, 1, (1, 3, 2)),
]


def test_chunks_go_round_the_stages():
    layout = StageLayout(7, 2, 2, (3, 1, 2, 1))
    expected = [[[0, 1, 2], [4, 5, PADDING]], [[3, PADDING, PADDING], [6, PADDING, PADDING]]]
    np.testing.assert_array_equal(layout.order.reshape(2, 2, 3), expected)
    np.testing.assert_array_equal(layout.is_real, np.array(expected) != PADDING)
    assert layout.num_slots == 3 and not layout.is_identity


def test_an_even_split_leaves_the_last_stages_smaller():
    assert StageLayout(7, 4).sizes == (2, 2, 2, 1)
    assert StageLayout(5, 2, 2).sizes == (2, 1, 1, 1)
    assert StageLayout(8, 4).is_identity and StageLayout(3, 1).is_identity
    assert not StageLayout(8, 2, 2).is_identity  # no padding, but chunks 0 and 2 lie together


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_way_there_and_back_loses_nothing(layout):
    def there_and_back(tree):
        stored = jax.tree.map(layout.from_canonical, tree)
        return stored, jax.tree.map(layout.to_canonical, stored)

    num = layout.num_periods
    tree = {
        "w": 1 + jnp.arange(num * 6, dtype=jnp.bfloat16).reshape(num, 2, 3),
        "steps": 1 + jnp.arange(num, dtype=jnp.int32),
        "mask": jnp.ones((num, 1), bool),
    }
    for function in (there_and_back, jax.jit(there_and_back)):
        stored, back = function(tree)
        jax.tree.map(np.testing.assert_array_equal, back, tree)
        assert jax.tree.all(
            jax.tree.map(lambda a, b, c: a.dtype == b.dtype == c.dtype, tree, stored, back)
        )
        expected = np.where(layout.order == PADDING, 0, layout.order + 1)
        np.testing.assert_array_equal(stored["steps"], expected)
        assert not np.any(np.asarray(stored["w"], float)[~layout.is_real.reshape(-1)])
        assert np.isfinite(np.asarray(stored["w"], float)).all()


def test_sharding_over_the_pipeline_gives_each_stage_its_chunks():
    layout = StageLayout(7, 4, 1, (1, 2, 3, 1))
    mesh = make_mesh(MeshConfig(pipeline=4), jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec(PIPELINE))
    stored = jax.jit(layout.from_canonical, out_shardings=sharding)(jnp.arange(7.0))
    by_stage = [np.asarray(shard.data) for shard in stored.addressable_shards]
    np.testing.assert_array_equal(by_stage, [[0, 0, 0], [1, 2, 0], [3, 4, 5], [6, 0, 0]])
    np.testing.assert_array_equal(layout.to_canonical(stored), np.arange(7.0))


def test_a_leaf_of_another_stack_is_not_cut():
    layout = StageLayout(7, 2)
    for function in (layout.from_canonical, layout.to_canonical):
        with pytest.raises(ValueError, match="rows, not shape"):
            function(jnp.zeros((6, 2)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (6, 4, 2),
            "MeshConfig.pipeline: given 4, expected pipeline * num_chunks <= periods of the stack, "
            "but 4 * 2 = 8 > 6; nearest: pipeline = 3 or num_chunks = 1",
        ),
        ((3, 4), "4 * 1 = 4 > 3; nearest: pipeline = 3"),
        ((1, 2, 3), "2 * 3 = 6 > 1; nearest: pipeline = 1 with num_chunks = 1"),
        (
            (6, 2, 2, (2, 2, 2)),
            "MeshConfig.stage_periods: given (2, 2, 2), expected pipeline * num_chunks = 2 * 2 = 4 "
            "numbers, here 3; nearest: (2, 2, 1, 1)",
        ),
        ((6, 2, 1, (3, 2)), "a sum of 6 periods, but 3 + 2 = 5; nearest: (3, 3)"),
        ((6, 2, 1, (5, 3)), "a sum of 6 periods, but 5 + 3 = 8; nearest: (3, 3)"),
        ((6, 3, 1, (4, 2, 0)), "at least 1 period in each chunk; nearest: (3, 2, 1)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError) as error:
        StageLayout(*arguments)
    assert message in str(error.value)


def test_a_second_save_compiles_nothing(caplog):
    layout = StageLayout(num_periods=3, num_stages=2)
    mesh = jax.make_mesh((2,), ("pipeline",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("pipeline"))
    stored = {"w": jax.device_put(layout.from_canonical(jnp.arange(3.0)), sharding)}
    compiled = []
    for _ in range(2):
        with jax.log_compiles(), caplog.at_level(logging.DEBUG, "jax"):
            whole = to_canonical(stored, stored, {"w": "L"}, layout)
        np.testing.assert_array_equal(whole["w"], np.arange(3.0))
        compiled.append("ompil" in caplog.text)
        caplog.clear()
    assert compiled == [True, False]
