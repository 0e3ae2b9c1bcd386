"""A stage's three programs: together they are its vjp, and none does another's part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.ops.norm import layer_norm, rms_norm
from jaxscale.parallel.pipeline.programs import make_stage_programs

RNG = np.random.default_rng(0)
PARAMS = {
    "up": jnp.asarray(RNG.normal(size=(4, 8)), jnp.float32),
    "down": jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32),
}
X, BATCH = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32), jnp.arange(3)
DY = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)


def layer(params, x, batch):
    angle = jnp.cos(batch)[:, None]  # depends on no activation
    return x + jnp.tanh(angle * x @ params["up"]) @ params["down"].astype(x.dtype)


def stage(params, x, batch):
    return layer(params, layer(params, x, batch), batch), x.sum()


def rematerialised(params, x, batch):
    return jax.checkpoint(layer)(params, jax.checkpoint(layer)(params, x, batch), batch), x.sum()


def looped(params, x, batch):
    return jax.lax.scan(lambda x, _: (layer(params, x, batch), None), x, length=2)[0], x.sum()


def count(program, name, *arguments):
    """How often a primitive stands in a program, in those inside it too."""

    def within(jaxpr):
        values = [
            value for eqn in jaxpr.eqns for value in jax.tree.leaves(list(eqn.params.values()))
        ]
        inner = [getattr(value, "jaxpr", value) for value in values if hasattr(value, "eqns")]
        return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(map(within, inner))

    return within(jax.make_jaxpr(program)(*arguments).jaxpr)


@pytest.mark.parametrize("is_deep", [False, True])
@pytest.mark.parametrize("function", [stage, rematerialised, looped])
def test_the_parts_are_the_whole(function, is_deep):
    parts = make_stage_programs(function, PARAMS, X, BATCH, is_deep=is_deep)
    wanted, pullback, total = jax.vjp(lambda p, x: function(p, x, BATCH), PARAMS, X, has_aux=True)
    y, aux, kept = jax.jit(parts.forward)(PARAMS, X, BATCH)
    dx, extra = jax.jit(parts.backward)(PARAMS, BATCH, kept, DY)
    dparams = jax.jit(parts.weight)(PARAMS, BATCH, kept, extra)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (y, aux, dparams, dx),
        (wanted, total, *pullback(DY)),
    )
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [
        (leaf.shape, leaf.dtype) for leaf in parts.kept
    ]


def test_matmuls_of_the_weights_are_the_weight_gradient_s_and_nothing_is_done_twice():
    """Each of four matmuls forward has two in the backward, one for either gradient."""
    parts = make_stage_programs(stage, PARAMS, X, BATCH, is_deep=True)
    _, _, kept = parts.forward(PARAMS, X, BATCH)
    _, extra = parts.backward(PARAMS, BATCH, kept, DY)
    assert count(parts.forward, "dot_general", PARAMS, X, BATCH) == 4
    assert count(parts.backward, "dot_general", PARAMS, BATCH, kept, DY) == 4
    assert count(parts.weight, "dot_general", PARAMS, BATCH, kept, extra) == 4


def test_what_depends_on_no_activation_is_made_again():
    parts = make_stage_programs(stage, PARAMS, X, BATCH, is_deep=True)
    _, _, kept = parts.forward(PARAMS, X, BATCH)
    # Neither weights nor cosines are kept.
    assert all(leaf.shape[0] == 3 and leaf.shape != (3, 1) for leaf in kept)
    # One cosine a layer.
    assert count(parts.backward, "cos", PARAMS, BATCH, kept, DY) == 2


def test_recomputation_is_done_by_the_backward_alone():
    """The forward again, with one tanh a layer, whose results the weight gradient gets from it."""
    parts = make_stage_programs(rematerialised, PARAMS, X, BATCH, is_deep=True)
    _, _, kept = parts.forward(PARAMS, X, BATCH)
    _, extra = parts.backward(PARAMS, BATCH, kept, DY)
    assert count(parts.backward, "tanh", PARAMS, BATCH, kept, DY) == 2
    assert count(parts.weight, "tanh", PARAMS, BATCH, kept, extra) == 0
    assert len(parts.kept) == 2  # the layers' inputs


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_nothing_is_left_to_the_weight_gradient_in_a_wider_type_than_it_was_made_in(kind):
    """The arithmetic inside the norm is in float32."""

    def normalised(params, x, batch):
        if kind == "rms":
            x = rms_norm(x, params["scale"], epsilon=1e-6)
        else:
            x = layer_norm(x, params["scale"], params["scale"], epsilon=1e-6)
        return x @ params["up"] @ params["down"], None

    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS | {"scale": jnp.ones(4)})
    parts = make_stage_programs(normalised, params, X.astype(jnp.bfloat16), BATCH, is_deep=True)
    between = [*parts.kept, *parts.extra]
    assert {leaf.dtype.name for leaf in between if leaf.shape == X.shape} <= {"bfloat16"}


def test_what_is_elementwise_is_made_again():
    def gated(params, x, batch):
        hidden = x.astype(jnp.float32) @ params["up"]
        return (jax.nn.silu(hidden) * jnp.exp(hidden)) @ params["down"], None

    x = X.astype(jnp.bfloat16)
    parts = make_stage_programs(gated, PARAMS, x, BATCH, is_deep=False)
    assert {(leaf.shape, leaf.dtype.name) for leaf in parts.kept} == {
        (x.shape, "bfloat16"),
        ((3, 8), "float32"),
    }
    assert count(parts.backward, "logistic", PARAMS, BATCH, parts.kept, DY) == 1
