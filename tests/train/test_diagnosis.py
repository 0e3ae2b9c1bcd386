"""The first tensor that is not finite is named: a parameter, an activation of one layer, a gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import tree
from jaxscale.parallel.batch import place
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train import losses
from jaxscale.train.diagnosis import first_non_finite


@pytest.fixture
def setup(make_setup):
    return make_setup()


def diagnose(setup, params, batch):
    plan = setup.plan
    return first_non_finite(
        plan.loss_fn, plan.region, params, place(plan.mesh, batch), jax.random.key(0)
    )


def test_a_parameter(setup, make_batch):
    params = setup.start().params
    params["layers"]["0"]["ffn"]["up"] = params["layers"]["0"]["ffn"]["up"].at[1, 2, 3].set(jnp.nan)
    assert diagnose(setup, params, make_batch()) == "parameter layers/0/ffn/up"


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(data=2, tensor=2)], ids=["one_device", "mesh"]
)
def test_an_activation_that_overflows_names_its_layer(make_setup, make_batch, mesh):
    """Finite values of 2e38 in the second layer: their sum is not."""
    setup = make_setup(mesh=mesh)
    params = setup.start().params
    params["layers"]["0"]["attention"]["v"] = (
        params["layers"]["0"]["attention"]["v"].at[1].set(2e38)
    )
    assert diagnose(setup, params, make_batch()) == "layers/0/v, layer 1 of its stack"


PIPELINES = {
    "rows 0, none, 1, 2": (
        MeshConfig(pipeline=2, data=2, tensor=2, stage_periods=(1, 2), zero=3),
        3,
    ),
    "rows 0, 2, 1, 3": (MeshConfig(pipeline=2, num_chunks=2, schedule="interleaved"), 4),
}


@pytest.mark.parametrize(
    ("stored", "path", "layer", "name"),
    [
        ("rows 0, none, 1, 2", "layers/0/attention/v", 2, "layers/0/v, layer 2 of its stack"),
        ("rows 0, 2, 1, 3", "layers/0/moe/router", 1, "layers/0/router, layer 1 of its stack"),
        ("rows 0, none, 1, 2", "prefix/0/attention/v", None, "prefix/0/v"),
        ("rows 0, none, 1, 2", "head/weights", None, "logits"),
    ],
)
def test_an_activation_in_a_pipeline(make_setup, make_batch, stored, path, layer, name):
    mesh, num_periods = PIPELINES[stored]
    sizes = dict(
        num_layers=1 + num_periods,
        num_dense_prefix=1,
        moe_pattern=(True,),
        num_experts=4,
        expert_dim=16,
    )
    model = dataclasses.replace(make_setup().plan.loss_fn.model, **sizes)
    setup = make_setup(model=model, mesh=mesh, num_microbatches=2)
    order = list(setup.plan.region.specs.layout.order)

    def overflow(each, leaf):
        rows = slice(None) if layer is None else order.index(layer)
        return leaf.at[rows].set(2e38) if each == path else leaf

    params = tree.map_with_path(overflow, setup.start().params)
    assert diagnose(setup, params, make_batch()) == f"{name}, micro-batch 0"


def test_a_feed_forward_that_overflows(setup, make_batch):
    """Of the last layer, which no other follows."""
    params = setup.start().params
    for name in ("up", "down"):
        params["layers"]["0"]["ffn"][name] = params["layers"]["0"]["ffn"][name].at[1].set(1e25)
    assert diagnose(setup, params, make_batch()) == "layers/0/feed_forward, layer 1 of its stack"


def test_an_output_projection_that_overflows(setup, make_batch):
    params = setup.start().params
    for name in ("v", "o"):
        params["layers"]["0"]["attention"][name] = (
            params["layers"]["0"]["attention"][name].at[1].set(1e25)
        )
    assert diagnose(setup, params, make_batch()) == "layers/0/attended, layer 1 of its stack"


def test_a_router_that_overflows(make_setup, make_batch):
    model = dataclasses.replace(
        make_setup().plan.loss_fn.model, moe_pattern=(False, True), num_experts=4, expert_dim=16
    )
    setup = make_setup(model=model)
    params = setup.start().params
    params["layers"]["1"]["moe"]["router"] = params["layers"]["1"]["moe"]["router"].at[:].set(2e38)
    assert diagnose(setup, params, make_batch()) == "layers/1/router, layer 0 of its stack"


def test_logits_that_overflow(make_setup, make_batch):
    setup = make_setup(mesh=MeshConfig(data=2, tensor=2))
    params = setup.start().params
    params["head"]["weights"] = params["head"]["weights"].at[7].set(2e38)
    assert diagnose(setup, params, make_batch()) == "logits"


def test_the_micro_batch_is_named(make_setup, make_batch):
    """Only row 2, of micro-batch 2 % 4, holds the token that has a part in dim 0, whose values overflow."""
    setup, batch = make_setup(num_microbatches=4), make_batch()
    batch["tokens"] = np.where(np.arange(8)[:, None] == 2, 31, batch["tokens"]).astype(np.int32)
    params = setup.start().params
    params["embedding"]["tokens"] = (
        params["embedding"]["tokens"].at[:, 0].set(0).at[31].set(jnp.eye(16)[0])
    )
    params["layers"]["0"]["attention"]["v"] = (
        params["layers"]["0"]["attention"]["v"].at[0, 0].set(2e38)
    )
    assert diagnose(setup, params, batch) == "layers/0/v, layer 0 of its stack, micro-batch 2"


def test_a_loss_of_ones_own(setup, make_batch):
    """Of a loss that has no stack nothing is known but the contract."""
    batch = place(setup.plan.mesh, make_batch())

    def loss_fn(params, batch, key, *, operations):
        loss, weight, _ = setup.plan.loss_fn(params, batch, key, operations=operations)
        return loss * jnp.inf, weight, {}

    name = first_non_finite(
        loss_fn, setup.plan.region, setup.start().params, batch, jax.random.key(0)
    )
    assert name == "loss"


def test_nothing(setup, make_batch):
    assert (
        diagnose(setup, setup.start().params, make_batch())
        == "nothing: this time every tensor was finite"
    )


@functools.partial(jax.custom_vjp)
def blow_up(x):
    return x


blow_up.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.inf,))


@pytest.mark.parametrize(
    ("mesh", "last"),
    [(MeshConfig(), 1), (MeshConfig(pipeline=2, stage_periods=(1, 2)), 2)],
    ids=["one_device", "pipeline_that_stores_rows_0_none_1_2"],
)
def test_a_gradient_alone(make_setup, make_batch, monkeypatch, mesh, last):
    """The forward is finite; the backward of the final norm's input is not."""
    final_hidden = losses.transformer.final_hidden
    monkeypatch.setattr(
        losses.transformer, "final_hidden", lambda p, x, **s: final_hidden(p, blow_up(x), **s)
    )
    model = dataclasses.replace(make_setup().plan.loss_fn.model, num_layers=last + 1)
    setup = make_setup(model=model, mesh=mesh, num_microbatches=2)
    gradient = f"gradient of layers/0/ffn/down, layer {last} of its stack"
    assert diagnose(setup, setup.start().params, make_batch()) == gradient
