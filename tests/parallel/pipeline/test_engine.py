"""What a pipeline costs: memory by schedule, work done once, shares of what is in no layer."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxscale import tree
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops import loss as loss_of_ops
from jaxscale.ops.attention import attention
from jaxscale.parallel.mesh import PIPELINE, MeshConfig
from jaxscale.parallel.rules import all_axes_of, make_specs
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.setup import make_setup
from tests.parallel.comparison import (
    KEY,
    canonical,
    dense,
    make_batch,
    make_loss,
    make_params,
    make_region,
    single_device,
)

WIDE = dict(model_dim=64, ffn_dim=256)
MODEL = dense(num_layers=4, **WIDE)


def compiled(schedule, num_microbatches, pipeline=2, remat="none", width=64):
    """The gradient of micro-batches of 8 rows each and a layer a stage, unrolled."""
    model = dense(num_layers=pipeline, model_dim=width, ffn_dim=4 * width)
    config = MeshConfig(pipeline=pipeline, schedule=schedule)
    region = make_region(
        model,
        config,
        num_microbatches=num_microbatches,
        dtype="float32",
        attend=attention,
    )
    loss = make_loss(model, "float32", is_scanned=False, remat=remat)
    batch = jax.tree.map(lambda x: np.tile(x, (num_microbatches, 1)), make_batch())
    params = abstract_params(parameter_table(model), "float32")
    return jax.jit(region.gradient(loss)).lower(params, batch, KEY).compile()


def temporary_bytes(schedule, num_microbatches, pipeline=2):
    return compiled(schedule, num_microbatches, pipeline).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("name", "num_chunks"),
    [
        pytest.param("gpipe", 1, marks=pytest.mark.long),
        pytest.param("1f1b", 1, marks=pytest.mark.long),
        ("interleaved", 2),
        ("zero_bubble", 1),
    ],
)
def test_a_table_may_be_an_argument(name, num_chunks):
    """One program then runs any table of as many ticks and slots.

    `pipeline_prediction.py` does that.
    """
    config = MeshConfig(pipeline=2, schedule=name, num_chunks=num_chunks)
    region = make_region(MODEL, config, num_microbatches=4, dtype="float32")
    loss = make_loss(MODEL, "float32", is_scanned=False)

    def gradient(params, rows):
        schedule = dataclasses.replace(region.schedule, rows=rows)
        with_rows = dataclasses.replace(region, schedule=schedule)
        return with_rows.gradient(loss)(params, make_batch(), KEY)

    params = abstract_params(parameter_table(MODEL), "float32")
    (loss_sum, _, _), gradients = jax.eval_shape(gradient, params, region.schedule.rows)
    assert loss_sum.shape == ()
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, params)


def test_many_slots_share_a_branch():
    """Else GPipe's program would grow with its micro-batches."""
    config = MeshConfig(pipeline=2, schedule="gpipe")
    region = make_region(MODEL, config, num_microbatches=8, dtype="float32")
    loss = make_loss(MODEL, "float32", remat="none")
    params = abstract_params(parameter_table(MODEL), "float32")
    gradient = jax.make_jaxpr(region.gradient(loss))(params, make_batch(), KEY)
    branches = [
        eqn.params["branches"] for eqn in every_equation(gradient.jaxpr) if "branches" in eqn.params
    ]
    assert max(map(len, branches)) == 2


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
    """Of the branches for each slot one counts, so the FLOPs are one micro-batch's.

    Under full remat the layers' forward is in B once more, and not a third time in W. Only norms
    are, from their inputs; beside products of this width they are within the tolerance.
    """
    flops = {
        (name, remat): compiled(name, 4, remat=remat, width=128).cost_analysis()["flops"]
        for name in ("1f1b", "zero_bubble")
        for remat in ("none", "full")
    }
    for remat in ("none", "full"):
        assert flops["zero_bubble", remat] == pytest.approx(flops["1f1b", remat], rel=0.01)
    assert flops["1f1b", "full"] > 1.2 * flops["1f1b", "none"]


TRAINED = ".*attention/q|head.*"


@pytest.mark.parametrize(
    "schedule",
    [
        "1f1b",
        pytest.param("gpipe", marks=pytest.mark.long),
        pytest.param("interleaved", marks=pytest.mark.long),
        pytest.param("zero_bubble", marks=pytest.mark.long),
    ],
)
def test_stages_share_the_head_and_frozen_layers_have_no_gradient(schedule, monkeypatch):
    """Forward and backward once for each micro-batch and chunk of its loss, on each stage.

    A stage has half of the vocabulary, so no product of the head is thrown away.
    """
    sizes = set()
    compute = loss_of_ops.label_and_normaliser

    def recorded(h, head, *others):
        sizes.add(loss_of_ops.num_rows(head))
        return compute(h, head, *others)

    monkeypatch.setattr(loss_of_ops, "label_and_normaliser", recorded)
    num_chunks = 2 if schedule == "interleaved" else 1
    model = dense(num_layers=2 * num_chunks)
    config = MeshConfig(pipeline=2, schedule=schedule, num_chunks=num_chunks)
    counts = collections.Counter()
    with jax.enable_x64(True):
        region = make_region(model, config, num_microbatches=2, trainable=TRAINED)
        region = dataclasses.replace(region, operations=watched(region.operations, counts))
        loss = make_loss(model, remat="none", is_scanned=schedule != "zero_bubble")
        params = region.specs.layout.store(make_params(model), region.specs.dims)
        _, gradients = jax.jit(region.gradient(loss))(params, make_batch(), KEY)
        jax.block_until_ready(gradients)
        jax.effects_barrier()
        monkeypatch.undo()
        _, wanted = single_device(model)
        found = tree.flatten(canonical(region.specs, gradients))
    each = 2 * loss.execution.num_loss_chunks
    assert counts == {(name, stage): each for name in ("forward", "backward") for stage in (0, 1)}
    assert sizes == {model.vocab_size // 2}
    assert set(found) == {"layers/0/attention/q", "head/weights"}
    for path, gradient in found.items():
        want = tree.flatten(wanted)[path]
        np.testing.assert_allclose(gradient, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "vocab_size, num_members", [pytest.param(63, 1, marks=pytest.mark.long), (64, 2)]
)
def test_a_head_that_stages_do_not_divide_and_one_that_tensor_groups_divide_too(
    vocab_size, num_members
):
    model = dense(vocab_size=vocab_size)
    config = MeshConfig(pipeline=2, tensor=num_members)
    batch = make_batch()
    batch |= {name: batch[name] % vocab_size for name in ("tokens", "labels")}
    with jax.enable_x64(True):
        loss = make_loss(model)
        region = make_region(model, config, num_microbatches=2)
        params = make_params(model)
        stored = region.specs.layout.store(params, region.specs.dims)
        _, found = jax.jit(region.gradient(loss))(stored, batch, KEY)
        wanted = jax.jit(jax.grad(lambda params: loss(params, batch, None)[0]))(params)
        found = canonical(region.specs, found)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), found, wanted)


def watched(operations, counts):
    """The operations; `counts` learns which stages run the loss, forward and backward."""

    def count(name):
        def add(stage):
            counts[name, int(stage)] += 1

        jax.debug.callback(add, lax.axis_index(PIPELINE))

    @jax.custom_vjp
    def watch(h):
        count("forward")
        return h

    def backward(_, g):
        count("backward")
        return (g,)

    watch.defvjp(lambda h: (watch(h), None), backward)
    plain = operations.backends.token_loss

    def token_loss(h, *others):
        return plain(watch(h), *others)

    backends = dataclasses.replace(operations.backends, token_loss=token_loss)
    return dataclasses.replace(operations, backends=backends)


def test_what_is_in_no_layer_is_shared_by_all_stages():
    specs = make_specs(parameter_table(MODEL), MeshConfig(pipeline=4, data=2, zero=1))
    for role in ("parameters", "gradients", "optimizer"):
        for path, spec in tree.flatten(getattr(specs, role)).items():
            assert PIPELINE in all_axes_of(spec), (role, path)


def test_a_stage_holds_its_share_of_the_bytes():
    """Of every parameter and every moment, those of the embedding and of the head too."""
    model = dense(num_layers=4)
    setup = make_setup(
        table=parameter_table(model),
        loss_fn=make_loss(model, "float32"),
        mesh=MeshConfig(pipeline=4),
        optimizer=OptimizerConfig(name="adamw"),
        train=TrainConfig(steps=1, num_microbatches=4),
        devices=jax.devices()[:4],
    )
    state = setup.init(seed=0)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    for leaf in (*jax.tree.leaves(state.params), *moments):
        num_bytes = {shard.data.nbytes for shard in leaf.addressable_shards}
        assert num_bytes == {leaf.nbytes // 4}


def test_evaluation_passes_the_stages():
    config = MeshConfig(pipeline=2, schedule="interleaved", num_chunks=2)
    model = dense(num_layers=4)
    with jax.enable_x64(True):
        region = make_region(model, config, num_microbatches=2)
        params = region.specs.layout.store(make_params(model), region.specs.dims)
        loss_fn = make_loss(model)
        evaluate = jax.jit(region.evaluate(loss_fn))
        loss, weight, _ = evaluate(params, make_batch(), KEY)
        wanted, _, _ = jax.jit(loss_fn)(make_params(model), make_batch(), None)
        np.testing.assert_allclose(loss, wanted, rtol=1e-12)
        assert weight == make_batch()["weights"].sum()
