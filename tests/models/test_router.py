"""Routers that draw or learn in training and serve as the most probable experts do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.config import (
    DenseMixerRouter,
    ExpertsConfig,
    MaskedSamplingRouter,
    SparseMixerRouter,
    TopKRouter,
)
from jaxscale.models.moe import experts as run_experts
from jaxscale.models.moe import router_sums
from jaxscale.models.router import route
from jaxscale.models.sparsemixer import sparsemixer
from jaxscale.ops import moe
from jaxscale.ops.backends import Operations
from jaxscale.ops.draws import Draws

D, E = 3, 5
Z = np.array([0.9, 1.0, 0.5, -0.4, 0.7])
RNG = np.random.default_rng(1)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def mixture(router, num_active):
    return ExpertsConfig(num_experts=E, dim=4, num_active=num_active, router=router)


def matrices(*names):
    """Random matrices of all experts."""
    shapes = {"up": (E, D, 4), "gate": (E, D, 4), "down": (E, 4, D)}
    return {name: jnp.asarray(RNG.normal(size=shapes[name])) for name in names}


def random_logits(tokens):
    return jnp.asarray(np.random.default_rng(3).normal(size=(1, tokens, E)))


def random_draws(tokens):
    keys = np.random.default_rng(4).integers(0, 2**32, (1, tokens, 2))
    return Draws(jnp.asarray(keys, jnp.uint32), 3)


def test_the_masked_sampling_router_draws_the_same_experts_and_gates_them_conventionally():
    z, draws = random_logits(64), random_draws(64)
    config = mixture(MaskedSamplingRouter(0.4), 2)
    routing = jax.jit(route, static_argnums=2)(z, draws, config)
    drawn = jax.jit(sparsemixer, static_argnums=2)(z, draws, mixture(SparseMixerRouter(0.4), 2))
    np.testing.assert_array_equal(routing.index, drawn.index)
    odds = np.exp(np.take_along_axis(np.asarray(z), np.asarray(routing.index), -1))
    np.testing.assert_allclose(routing.gates, odds / odds.sum(-1, keepdims=True), rtol=1e-12)
    assert routing.slopes is None


@pytest.mark.parametrize("num_active", [1, 2])
def test_densemixer_is_top_k_whose_router_learns_from_every_expert(num_active):
    """Its router's gradient is that of a gate for every expert, those not chosen by a fixed sum."""
    x = jnp.asarray(RNG.normal(size=(1, 1, D)))
    weights = matrices("up", "down")
    z = jnp.asarray(Z)[None, None]

    def ours(router):
        def loss(z, weights):
            draws = Draws(jnp.zeros((1, 1, 2), jnp.uint32))
            index, gates, slopes, _ = route(z, draws, mixture(router, num_active))
            return jnp.sin(moe.experts(x, index, gates, weights, "gelu", slopes)).sum()

        return loss

    def literal(z, weights):
        p = jax.nn.softmax(z[0, 0])
        chosen = np.isin(np.arange(E), np.argsort(-Z)[:num_active])
        total = (p * chosen).sum() if num_active > 1 else 1.0
        gate = jnp.where(chosen, p / total, p / jax.lax.stop_gradient(total))
        gate = gate - jax.lax.stop_gradient(gate * ~chosen)
        outputs = [jax.nn.gelu(x[0, 0] @ weights["up"][e]) @ weights["down"][e] for e in range(E)]
        return jnp.sin(gate @ jnp.stack(outputs)).sum()

    losses = [ours(DenseMixerRouter()), ours(TopKRouter()), literal]
    both = jax.jit(lambda *args: [jax.value_and_grad(loss, (0, 1))(*args) for loss in losses])
    (value, (dz, dweights)), (wanted, (dz_top_k, dweights_top_k)), (_, (dz_literal, _)) = both(
        z, weights
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    for got, want in zip(jax.tree.leaves(dweights), jax.tree.leaves(dweights_top_k), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    np.testing.assert_allclose(dz, dz_literal, atol=1e-12)
    assert np.abs(dz - dz_top_k).max() > 1e-3


@pytest.mark.parametrize("router", [DenseMixerRouter(), MaskedSamplingRouter(0.4)], ids=type)
def test_a_router_that_is_top_k_without_draws_counts_the_chosen_only(router):
    config, z = mixture(router, 2), random_logits(8)
    index, gates, _, _ = route(z, None, config)
    wanted = route(z, None, mixture(TopKRouter(), 2))
    np.testing.assert_array_equal(index, wanted.index)
    np.testing.assert_array_equal(gates, wanted.gates)

    params = {"router": jnp.eye(D, E), "experts": matrices("up", "gate", "down")}

    @jax.jit
    def load(params, h, draws):
        _, choices = run_experts(params, h, config, Operations(), draws)
        return router_sums(choices, jnp.ones((1, 8)), config, Operations()).load

    for draws in (None, random_draws(8)):
        assert load(params, jnp.ones((1, 8, D)), draws).sum() == 16
