"""What a pipeline costs: memory by schedule, no work done twice or thrown away, shares of what is in no layer."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxscale import tree
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.attention import attention
from jaxscale.parallel.mesh import PIPELINE, MeshConfig, make_mesh
from jaxscale.parallel.pipeline.schedule import make_schedule
from jaxscale.parallel.region import Region, make_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.train.state import abstract_state, init_state
from tests.parallel.test_region import (
    DENSE,
    make_batch,
    make_loss,
    make_params,
    on_mesh,
    single_device,
)

MODEL = dataclasses.replace(DENSE, num_layers=4, model_dim=64, ffn_dim=256)


def make_region(config, num_microbatches, model=MODEL):
    mesh = make_mesh(config, jax.devices()[: math.prod(config.sizes)])
    specs = make_specs(parameter_table(model), config)
    operations = make_operations(config, specs, attention=attention, reduction="float32")
    schedule = make_schedule(config.schedule, config.pipeline, config.num_chunks, num_microbatches)
    return Region(mesh, specs, operations, num_microbatches=num_microbatches, schedule=schedule)


def compiled(schedule, num_microbatches, pipeline=2, remat="none"):
    """The gradient of micro-batches of 8 rows each and a layer a stage, unrolled."""
    model = dataclasses.replace(MODEL, num_layers=pipeline)
    region = make_region(MeshConfig(pipeline=pipeline, schedule=schedule), num_microbatches, model)
    loss = make_loss(model, "float32", is_scanned=False, remat=remat)
    batch = jax.tree.map(lambda x: jnp.tile(x, (num_microbatches, 1)), make_batch())
    params = abstract_params(model, "float32")
    return jax.jit(region.gradient(loss)).lower(params, batch, jax.random.key(0)).compile()


def temporary_bytes(schedule, num_microbatches, pipeline=2):
    return compiled(schedule, num_microbatches, pipeline).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("name", "num_chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)]
)
def test_a_table_may_be_an_argument(name, num_chunks):
    """One program then runs any table of as many ticks and slots, as `pipeline_prediction.py` does."""
    mesh = MeshConfig(pipeline=2, schedule=name, num_chunks=num_chunks)
    region, loss = make_region(mesh, 4), make_loss(MODEL, "float32", is_scanned=False)

    def gradient(params, rows):
        schedule = dataclasses.replace(region.schedule, rows=rows)
        return dataclasses.replace(region, schedule=schedule).gradient(loss)(
            params, make_batch(), jax.random.key(0)
        )

    jax.jit(gradient).lower(abstract_params(MODEL, "float32"), region.schedule.rows)


def test_many_slots_share_a_branch():
    """Else GPipe's program would grow with its micro-batches."""
    region, loss = (
        make_region(MeshConfig(pipeline=2, schedule="gpipe"), 8),
        make_loss(MODEL, "float32", remat="none"),
    )
    gradient = jax.make_jaxpr(region.gradient(loss))(
        abstract_params(MODEL, "float32"), make_batch(), jax.random.key(0)
    )
    assert (
        max(
            len(eqn.params["branches"])
            for eqn in every_equation(gradient.jaxpr)
            if "branches" in eqn.params
        )
        == 2
    )


def every_equation(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            yield from every_equation(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.long
def test_activations_of_1f1b_grow_with_stages_and_not_with_microbatches():
    """The first stage keeps what 2 S - 1 micro-batches leave: 3 with two stages, 7 with four."""
    few, many = (temporary_bytes("1f1b", number) for number in (4, 16))
    assert many < 1.1 * few
    assert temporary_bytes("1f1b", 16, pipeline=4) > 1.6 * many
    few, many = (temporary_bytes("gpipe", number) for number in (4, 16))
    assert many > 2 * few


@pytest.mark.long
def test_zero_bubble_does_nothing_twice():
    """One branch counts of those that F, B and W have for each slot, so their FLOPs are one micro-batch's.

    Under full remat the layers' forward is in B once more, and not a third time in W.
    """
    flops = {
        (name, remat): compiled(name, 4, remat=remat).cost_analysis()["flops"]
        for name in ("1f1b", "zero_bubble")
        for remat in ("none", "full")
    }
    for remat in ("none", "full"):
        assert flops["zero_bubble", remat] == pytest.approx(flops["1f1b", remat], rel=0.01)
    assert flops["1f1b", "full"] > 1.2 * flops["1f1b", "none"]


@pytest.mark.parametrize(
    "schedule",
    [
        "1f1b",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("gpipe", "interleaved", "zero_bubble")
        ),
    ],
)
def test_only_the_last_stage_runs_the_head(schedule):
    """Forward and backward once for each micro-batch and chunk of its loss, so that no product of it is thrown away."""
    config, counts = (
        MeshConfig(pipeline=2, schedule=schedule, num_chunks=1 + (schedule == "interleaved")),
        collections.Counter(),
    )
    region = make_region(config, 4)

    def count(name):
        jax.debug.callback(
            lambda stage: counts.update([(name, int(stage))]), lax.axis_index(PIPELINE)
        )

    @jax.custom_vjp
    def watched(h):
        count("forward")
        return h

    def backward(_, g):
        count("backward")
        return (g,)

    watched.defvjp(lambda h: (watched(h), None), backward)
    plain = region.operations.token_loss
    watching = dataclasses.replace(
        region.operations, token_loss=lambda h, *others: plain(watched(h), *others)
    )
    loss = make_loss(MODEL, "float32", is_scanned=schedule != "zero_bubble")
    params = region.specs.layout.store(
        jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), make_params(MODEL)), region.specs.dims
    )
    run = jax.jit(dataclasses.replace(region, operations=watching).gradient(loss))
    jax.block_until_ready(run(params, make_batch(), jax.random.key(0)))
    jax.effects_barrier()
    each = 4 * loss.stack.num_loss_chunks
    assert counts == {("forward", 1): each, ("backward", 1): each}


def test_what_is_in_no_layer_is_shared_by_all_stages():
    table = parameter_table(MODEL)
    specs = make_specs(table, MeshConfig(pipeline=4, data=2, zero=1))
    shapes = tree.flatten(table)
    for role in ("parameters", "gradients", "optimizer"):
        for path, spec in tree.flatten(getattr(specs, role)).items():
            axes = {
                axis
                for entry in spec
                if entry
                for axis in (entry if isinstance(entry, tuple) else (entry,))
            }
            assert PIPELINE in axes, (role, path, shapes[path].shape)


def test_a_stage_holds_its_share_of_the_bytes():
    """Of every parameter and every moment, those of the embedding and of the head too."""
    config, optimizer = MeshConfig(pipeline=4), optax.adamw(1e-3)
    mesh, specs = make_mesh(config, jax.devices()[:4]), make_specs(parameter_table(MODEL), config)
    state = abstract_state(
        MODEL, optimizer, mesh=mesh, specs=specs, dtype="float32", trainable=".*"
    )
    state = init_state(MODEL, optimizer, state, specs=specs, seed=0, trainable=".*")
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    for leaf in (*jax.tree.leaves(state.params), *moments):
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 4}


def test_evaluation_passes_the_stages():
    config = MeshConfig(pipeline=2, schedule="interleaved", num_chunks=2)
    with jax.enable_x64(True):
        model = dataclasses.replace(DENSE, num_layers=4)
        region = make_region(config, 2, model)
        params = region.specs.layout.store(make_params(model), region.specs.dims)
        loss, weight, _ = jax.jit(region.evaluate(make_loss(model)))(
            params, make_batch(), jax.random.key(0)
        )
        np.testing.assert_allclose(loss, single_device(model)[0], rtol=1e-12)
        assert weight == make_batch()["weights"].sum()


def test_frozen_layers_have_no_gradient():
    with jax.enable_x64(True):
        _, gradients = on_mesh(
            DENSE, num_microbatches=2, pipeline=2, trainable=".*attention/q|head.*"
        )
        _, wanted = single_device(DENSE)
        assert set(tree.flatten(gradients)) == {"layers/0/attention/q", "head/weights"}
        for path, gradient in tree.flatten(gradients).items():
            np.testing.assert_allclose(gradient, tree.flatten(wanted)[path], rtol=1e-9, atol=1e-12)
