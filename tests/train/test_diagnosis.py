"""The first tensor that is not finite is named: a parameter, an activation of one layer, a gradient."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train import losses
from jaxscale.train.diagnosis import first_non_finite
from jaxscale.train.evaluation import place


@pytest.fixture
def setup(make_setup):
    return make_setup()


def diagnose(setup, params, batch):
    plan = setup.plan
    return first_non_finite(plan.loss_fn, plan.region, params, place(plan.mesh, batch), jax.random.key(0))


def test_a_parameter(setup, make_batch):
    params = setup.start().params
    params["layers"]["0"]["ffn"]["up"] = params["layers"]["0"]["ffn"]["up"].at[1, 2, 3].set(jnp.nan)
    assert diagnose(setup, params, make_batch()) == "parameter layers/0/ffn/up"


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, tensor=2)], ids=["one_device", "mesh"])
def test_an_activation_that_overflows_names_its_layer(make_setup, make_batch, mesh):
    """Finite values of 2e38 in the second layer: their sum is not."""
    setup = make_setup(mesh=mesh)
    params = setup.start().params
    params["layers"]["0"]["attention"]["v"] = params["layers"]["0"]["attention"]["v"].at[1].set(2e38)
    assert diagnose(setup, params, make_batch()) == "layers/0/v, layer 1 of its stack"


def test_a_feed_forward_that_overflows_shows_in_the_next_residual(setup, make_batch):
    params = setup.start().params
    for name in ("up", "down"):
        params["layers"]["0"]["ffn"][name] = params["layers"]["0"]["ffn"][name].at[0].set(1e25)
    assert diagnose(setup, params, make_batch()) == "layers/0/residual, layer 1 of its stack"


def test_nothing(setup, make_batch):
    assert diagnose(setup, setup.start().params, make_batch()) == "nothing: this time every tensor was finite"


@functools.partial(jax.custom_vjp)
def blow_up(x):
    return x


blow_up.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.inf,))


def test_a_gradient_alone(make_setup, make_batch, monkeypatch):
    """The forward is finite; the backward of the final norm's input is not."""
    final_hidden = losses.transformer.final_hidden
    monkeypatch.setattr(losses.transformer, "final_hidden", lambda p, x, **s: final_hidden(p, blow_up(x), **s))
    setup = make_setup()
    assert diagnose(setup, setup.start().params, make_batch()) == "gradient of embedding/tokens"
