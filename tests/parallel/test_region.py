"""What the manual region adds to a loss: micro-batches that add up, and parameters left out."""

import jax
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.models.parameters import parameter_table
from jaxscale.parallel.mesh import DATA, MeshConfig
from jaxscale.parallel.rules import all_axes_of, make_specs
from tests.parallel.comparison import (
    DENSE,
    assert_equal_to_single_device,
    on_mesh,
    single_device,
)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.long
def test_data_expert_tensor_equal_one_device():
    result = on_mesh(DENSE, data=2, expert=2, tensor=2, zero=3)
    assert_equal_to_single_device(result, single_device(DENSE))


def test_microbatches_equal_one_batch():
    """Unequal numbers of valid tokens, one of them zero; gradients are sharded as ZeRO says."""
    result = on_mesh(DENSE, num_microbatches=4, data=2, zero=2)
    assert_equal_to_single_device(result, single_device(DENSE))
    _, gradients = result
    specs = make_specs(parameter_table(DENSE), MeshConfig(data=2, zero=2)).gradients
    flat_specs = dict(zip(tree.flatten(gradients), jax.tree.leaves(specs), strict=True))
    for path, leaf in tree.flatten(gradients).items():
        num_shards = 2 if DATA in all_axes_of(flat_specs[path]) else 1
        local = leaf.addressable_shards[0].data
        assert local.size == leaf.size // num_shards, path


def test_frozen_parameters_have_no_gradient():
    _, gradients = on_mesh(DENSE, trainable=".*attention/[qk]", data=2, zero=3)
    _, wanted = single_device(DENSE)
    assert set(gradients) == set(wanted)
    flat, flat_wanted = tree.flatten(gradients), tree.flatten(wanted)
    assert set(flat) == {"layers/0/attention/q", "layers/0/attention/k"}
    for path, leaf in flat.items():
        np.testing.assert_allclose(leaf, flat_wanted[path], rtol=1e-9, atol=1e-14)
