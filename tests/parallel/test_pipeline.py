"""What a pipeline costs: memory by schedule, no work done twice or thrown away, shares of what is in no layer."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxscale import tree
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.attention import attention
from jaxscale.parallel.mesh import PIPELINE, MeshConfig, make_mesh
from jaxscale.parallel.region import Region, make_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.parallel.schedule import make_schedule
from tests.parallel.test_region import DENSE, make_batch, make_loss, make_params, on_mesh, single_device

MODEL = dataclasses.replace(DENSE, num_layers=4, model_dim=64, ffn_dim=256)


def make_region(config, num_microbatches, model=MODEL):
    mesh = make_mesh(config, jax.devices()[: math.prod(config.sizes)])
    specs = make_specs(parameter_table(model), config)
    operations = make_operations(config, specs, attention=attention, reduction="float32")
    schedule = make_schedule(config.schedule, config.pipeline, config.num_chunks, num_microbatches)
    return Region(mesh, specs, operations, num_microbatches=num_microbatches, schedule=schedule)


def compiled(schedule, num_microbatches, pipeline=2):
    """The gradient of micro-batches of 8 rows each, unrolled and without remat."""
    region = make_region(MeshConfig(pipeline=pipeline, schedule=schedule), num_microbatches)
    loss = make_loss(MODEL, "float32", is_scanned=False, remat="none")
    batch = jax.tree.map(lambda x: jnp.tile(x, (num_microbatches, 1)), make_batch())
    params = abstract_params(MODEL, "float32")
    return jax.jit(region.gradient(loss)).lower(params, batch, jax.random.key(0)).compile()


def temporary_bytes(schedule, num_microbatches, pipeline=2):
    return compiled(schedule, num_microbatches, pipeline).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["1f1b", "zero_bubble"])
def test_a_table_may_be_an_argument(name):
    """One program then runs any table of as many ticks and slots, as `pipeline_prediction.py` does."""
    region, loss = make_region(MeshConfig(pipeline=2, schedule=name), 4), make_loss(MODEL, "float32", is_scanned=False)

    def gradient(params, rows):
        schedule = dataclasses.replace(region.schedule, rows=rows)
        return dataclasses.replace(region, schedule=schedule).gradient(loss)(params, make_batch(), jax.random.key(0))

    jax.jit(gradient).lower(abstract_params(MODEL, "float32"), region.schedule.rows)


def test_many_slots_share_a_branch():
    """Else GPipe's program would grow with its micro-batches."""
    region, loss = make_region(MeshConfig(pipeline=2, schedule="gpipe"), 8), make_loss(MODEL, "float32", remat="none")
    gradient = jax.make_jaxpr(region.gradient(loss))(abstract_params(MODEL, "float32"), make_batch(), jax.random.key(0))
    assert max(len(eqn.params["branches"]) for eqn in every_equation(gradient.jaxpr) if "branches" in eqn.params) == 2


def every_equation(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            yield from every_equation(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.long
def test_activations_of_1f1b_grow_with_stages_and_not_with_microbatches():
    few, many = (temporary_bytes("1f1b", number) for number in (4, 16))
    assert many < 1.1 * few
    few, many = (temporary_bytes("gpipe", number) for number in (4, 16))
    assert many > 2 * few


@pytest.mark.long
def test_zero_bubble_does_nothing_twice():
    """One branch counts of those that F, B and W have for each slot, so their FLOPs are one micro-batch's."""
    whole, split = (compiled(name, 4).cost_analysis()["flops"] for name in ("1f1b", "zero_bubble"))
    assert split == pytest.approx(whole, rel=0.01)


def test_only_the_last_stage_runs_the_head():
    config, counts = MeshConfig(pipeline=4), collections.Counter()
    region = make_region(config, 4)

    def token_loss(*arguments):
        jax.debug.callback(lambda stage: counts.update([int(stage)]), lax.axis_index(PIPELINE))
        return plain(*arguments)

    plain = region.operations.token_loss
    region = dataclasses.replace(region, operations=dataclasses.replace(region.operations, token_loss=token_loss))
    loss = make_loss(MODEL, "float32")
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), make_params(MODEL))
    jax.block_until_ready(jax.jit(region.gradient(loss))(params, make_batch(), jax.random.key(0)))
    jax.effects_barrier()
    assert counts == {3: 4 * loss.stack.num_loss_chunks}  # micro-batches x chunks, once each


def test_what_is_in_no_layer_is_shared_by_all_stages():
    table = parameter_table(MODEL)
    specs = make_specs(table, MeshConfig(pipeline=4, data=2, zero=1))
    shapes = tree.flatten(table)
    for role in ("parameters", "gradients", "optimizer"):
        for path, spec in tree.flatten(getattr(specs, role)).items():
            axes = {axis for entry in spec if entry for axis in (entry if isinstance(entry, tuple) else (entry,))}
            assert PIPELINE in axes, (role, path, shapes[path].shape)


def test_evaluation_passes_the_stages():
    config = MeshConfig(pipeline=2, schedule="interleaved", num_chunks=2)
    with jax.enable_x64(True):
        model = dataclasses.replace(DENSE, num_layers=4)
        region = make_region(config, 2, model)
        params = region.specs.layout.store(make_params(model), region.specs.dims)
        loss, weight, _ = jax.jit(region.evaluate(make_loss(model)))(params, make_batch(), jax.random.key(0))
        np.testing.assert_allclose(loss, single_device(model)[0], rtol=1e-12)
        assert weight == make_batch()["weights"].sum()


def test_frozen_layers_have_no_gradient():
    with jax.enable_x64(True):
        _, gradients = on_mesh(DENSE, num_microbatches=2, pipeline=2, trainable=".*attention/q|head.*")
        _, wanted = single_device(DENSE)
        assert set(tree.flatten(gradients)) == {"layers/0/attention/q", "head/weights"}
        for path, gradient in tree.flatten(gradients).items():
            np.testing.assert_allclose(gradient, tree.flatten(wanted)[path], rtol=1e-9, atol=1e-12)
