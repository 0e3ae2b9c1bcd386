"""Any loss becomes one flat program that computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.parallel.pipeline.slices import evaluate
from jaxscale.planner.atomic import make_components
from jaxscale.planner.trace import trace
from jaxscale.types import InputError
from tests.planner.functions import mlp


def value_of(traced, params, batch):
    leaves = jax.tree.leaves((params, batch))
    (loss,) = evaluate(traced.program, leaves, traced.program.jaxpr.outvars)
    return loss


def names(traced):
    return [equation.primitive.name for equation in traced.program.jaxpr.eqns]


@jax.custom_vjp
def two_matmuls(x, w):
    return jnp.tanh(x @ w) @ w


two_matmuls.defvjp(lambda x, w: (two_matmuls(x, w), (x, w)), lambda res, dy: res)


@jax.custom_jvp
def halved(x):
    return x / 2


halved.defjvps(lambda dx, y, x: 7 * dx)


def test_programs_inside_are_written_out():
    w = jnp.linspace(-1, 1, 16).reshape(4, 4)
    batch = {"x": jnp.linspace(0, 1, 12).reshape(3, 4)}

    @jax.checkpoint
    def layer(x, w):
        return jax.jit(jnp.tanh)(x @ w)

    def loss(params, batch):
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), batch["x"], params)
        return (two_matmuls(x, params[0]) ** 2).mean()

    params = jnp.stack([w, w.T, w])
    traced = trace(loss, params, batch)
    assert names(traced).count("dot_general") == 3 + 2
    assert not {"scan", "jit", "pjit", "checkpoint", "remat2"} & set(names(traced))
    np.testing.assert_allclose(value_of(traced, params, batch), loss(params, batch), rtol=1e-6)


def test_a_reversed_scan_keeps_its_order():
    def loss(params, batch):
        carry, rows = jax.lax.scan(
            lambda c, x: (c * 0.5 + x, c - x), params, batch["x"], reverse=True
        )
        return (rows * jnp.arange(5.0)[:, None]).sum() + carry.sum()

    params, batch = jnp.ones(2), {"x": jnp.arange(10.0).reshape(5, 2)}
    traced = trace(loss, params, batch)
    np.testing.assert_allclose(value_of(traced, params, batch), loss(params, batch), rtol=1e-6)


def test_a_small_custom_derivative_is_kept():
    traced = trace(lambda p, b: halved(b["x"] @ p).sum(), jnp.ones((3, 3)), {"x": jnp.ones((2, 3))})
    assert "custom_jvp_call" in names(traced)


def test_constants_are_cloned_into_each_component_that_reads_them():
    loss, params, batch = mlp(num_layers=2)

    def with_constant(params, batch):
        scaled = jnp.sin(params["shared"])
        return loss({**params, "shared": scaled}, batch)

    traced = trace(with_constant, params, batch)
    components = make_components(traced)
    eqns = traced.program.jaxpr.eqns
    sine = next(n for n, each in enumerate(eqns) if each.primitive.name == "sin")
    holders = [each for each in components.equations if sine in each]
    assert len(holders) == 2  # where x enters and where it leaves
    own = [each[-1] for each in components.equations]
    assert own == sorted(set(own)) and sine not in own
    assert all(traced.depends_on_batch[number] for number in own)


def test_bad_input():
    batch = {"x": jnp.ones((2, 3))}
    with pytest.raises(InputError, match=r"loss: .*one scalar"):
        trace(lambda p, b: b["x"] * p, jnp.ones(3), batch)

    def branches(params, batch):
        return params.sum() if batch["x"].sum() > 0 else params.mean()

    with pytest.raises(InputError, match=r"'branches', expected a function that jax.jit could"):
        trace(branches, jnp.ones(3), batch)
