"""The type in which gradients of low-precision parameters add up.

They add up over micro-batches and over devices.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.models.config.facts import from_flat
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.attention import attention
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.region import Region, make_operations
from jaxscale.parallel.rules import make_specs

MODEL = from_flat(
    vocab_size=16,
    num_layers=1,
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    ffn_dim=8,
    max_length=1,
)
TABLE = parameter_table(MODEL)
# Half of the rows are on each device. To a sum of 256 bfloat16 adds 1 in vain.
REPEATS = 1024


def make_region(reduction, zero, num_microbatches):
    config = MeshConfig(data=2, zero=zero)
    specs = make_specs(TABLE, config)
    return Region(
        mesh=make_mesh(config, jax.devices()[:2]),
        specs=specs,
        operations=make_operations(config, specs, attention=attention, reduction=reduction),
        num_microbatches=num_microbatches,
        reduction=reduction,
        trainable="final_norm/scale",
    )


def sum_of_scale(params, batch, key, *, operations):
    """A loss whose gradient is 1 at each row."""
    gather = operations.collectives.gather_parameters
    scale = gather("final_norm", params["final_norm"])["scale"]
    num_rows = batch["weights"].sum()
    return (num_rows.astype(scale.dtype) * scale).sum(), num_rows, {}


def gradient(region):
    def ones(leaf):
        return jnp.ones(leaf.shape, leaf.dtype)

    params = jax.tree.map(ones, abstract_params(TABLE, "bfloat16"))
    batch = {"weights": jnp.ones((REPEATS, 1))}
    return functools.partial(region.gradient(sum_of_scale), params, batch, jax.random.key(0))


@pytest.mark.parametrize("zero", [1, 3])
def test_micro_batches_add_up_in_the_reduction_type(zero):
    """512 on each of two devices, one by one."""
    _, gradients = jax.jit(gradient(make_region("float32", zero, REPEATS // 2)))()
    (got,) = tree.flatten(gradients).values()
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, REPEATS)


@pytest.mark.parametrize(("reduction", "letters"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_zero_3_scatters_in_the_reduction_type(reduction, letters):
    """In the traced program: compilers may widen the sum of their own accord."""
    traced = str(jax.make_jaxpr(gradient(make_region(reduction, 3, 1)))())
    assert re.findall(r":(\w+)\[\d+\] = reduce_scatter", traced) == [letters]
