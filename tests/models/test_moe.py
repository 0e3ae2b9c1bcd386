"""The router, its gates and its losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.config import ModelConfig
from jaxscale.models.moe import feed_forward, router_sums
from jaxscale.models.parameters import init_params
from jaxscale.models.router import logits_of, route
from jaxscale.models.transformer import StackConfig, run_stack
from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.draws import EXPERT, Draws
from jaxscale.ops.operations import Operations
from jaxscale.ops.precision import Policy

B, T, D, E = 2, 5, 8, 4
CONFIG = ModelConfig(
    vocab_size=8,
    num_layers=1,
    model_dim=D,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=8,
    max_length=8,
    moe_pattern=(True,),
    num_experts=E,
    expert_dim=6,
    balance_loss=0.5,
    router_z_loss=0.25,
)
H = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
ROUTER = {"router": jnp.asarray(np.random.default_rng(1).normal(size=(D, E)), jnp.float32)}
WEIGHTS = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], jnp.float32)


def routed(h):
    """Experts, gates and logits of the default router."""
    logits = logits_of(ROUTER, h)
    return *route(logits, None, CONFIG)[:2], logits


def test_gates_are_the_softmax_over_the_chosen():
    index, gates, logits = routed(H)
    for b, t in np.ndindex(B, T):
        wanted = np.argsort(-np.asarray(logits[b, t]))[:2]
        assert list(index[b, t]) == list(wanted)
        odds = np.exp(np.asarray(logits[b, t])[wanted])
        np.testing.assert_allclose(gates[b, t], odds / odds.sum(), rtol=1e-5)


def test_routing_in_bfloat16_keeps_float32_logits():
    _, gates, logits = routed(H.astype(jnp.bfloat16))
    assert gates.dtype == logits.dtype == jnp.float32


def test_logits_of_bfloat16_tokens_are_those_of_the_float32_router():
    rng = np.random.default_rng(2)
    h, router = (
        jnp.asarray(rng.normal(size=(1, 8, 2048)), jnp.bfloat16),
        rng.normal(size=(2048, 16)).astype("float32"),
    )
    wanted = np.asarray(h, np.float64) @ router.astype(np.float64)
    np.testing.assert_allclose(
        logits_of({"router": jnp.asarray(router)}, h), wanted, atol=1e-5 * np.abs(wanted).max()
    )


def test_balance_loss_is_its_weight_when_balanced_and_more_when_not():
    weight = WEIGHTS.sum()
    even = jnp.zeros((B, T, E))
    spread = (jnp.arange(B * T).reshape(B, T, 1) * 2 + jnp.arange(2)) % E
    everywhere = jnp.ones((B, T))
    balanced = router_sums(spread, even, everywhere, CONFIG, Operations())
    np.testing.assert_allclose(balanced.balance, 0.5 * B * T, rtol=1e-6)
    one = jnp.zeros((B, T, 1), int)
    collapsed = router_sums(one, even.at[..., 0].set(50.0), WEIGHTS, CONFIG, Operations())
    np.testing.assert_allclose(collapsed.balance, 0.5 * E * weight, rtol=1e-6)
    np.testing.assert_allclose(collapsed.z, 0.25 * 50.0**2 * weight, rtol=1e-6)


def test_padding_is_in_no_figure():
    index, _, logits = routed(H)
    sums = router_sums(index, logits, WEIGHTS, CONFIG, Operations())
    changed = router_sums(
        jnp.where(WEIGHTS[..., None] > 0, index, 3),
        jnp.where(WEIGHTS[..., None] > 0, logits, 9.0),
        WEIGHTS,
        CONFIG,
        Operations(),
    )
    jax.tree.map(np.testing.assert_allclose, sums, changed)
    assert sums.load.sum() == 2 * WEIGHTS.sum()
    nothing = router_sums(index, logits, 0 * WEIGHTS, CONFIG, Operations())
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(nothing))


def test_small_weights_scale_the_losses():
    index, _, logits = routed(H)
    whole, part = (
        router_sums(index, logits, f * WEIGHTS, CONFIG, Operations()) for f in (1, 0.001)
    )
    jax.tree.map(lambda p, w: np.testing.assert_allclose(p, 0.001 * w, rtol=1e-5), part, whole)


def test_the_balance_loss_pushes_away_from_the_loaded_expert():
    index = jnp.zeros((B, T, 1), int)

    def balance(logits):
        return router_sums(index, logits, WEIGHTS, CONFIG, Operations()).balance

    gradient = jax.grad(balance)(jnp.zeros((B, T, E)))
    assert (gradient[WEIGHTS > 0][:, 0] > 0).all()
    assert (gradient[WEIGHTS > 0][:, 1:] < 0).all()


@pytest.mark.parametrize("num_active", [1, 2])
def test_the_output_teaches_the_router(num_active):
    """Top-1 too: a gate that was renormalised to 1 would give no gradient."""
    config = dataclasses.replace(CONFIG, num_active_experts=num_active)
    rng = np.random.default_rng(2)
    experts = {
        name: jnp.asarray(rng.normal(size=(E, *shape)), jnp.float32)
        for name, shape in {"up": (D, 6), "gate": (D, 6), "down": (6, D)}.items()
    }

    def loss(router):
        y, _ = feed_forward(
            {"router": router, "experts": experts}, H, WEIGHTS, config, Operations()
        )
        return (y**2).sum()

    assert jnp.abs(jax.grad(loss)(ROUTER["router"])).max() > 1e-2


@pytest.mark.parametrize("is_scanned", [False, True])
def test_every_layer_draws_for_itself(is_scanned):
    """What is dropped in a layer depends on its number in the model, the dense ones before it counted."""
    config = dataclasses.replace(
        CONFIG,
        num_layers=3,
        num_dense_prefix=1,
        router="sparsemixer_v2",
        router_threshold=1.0,
        expert_dropout=0.5,
    )
    draws = Draws(jnp.asarray(np.random.default_rng(2).integers(0, 2**32, (B, T, 2)), jnp.uint32))
    seen = []

    def spy(h, index, gates, weights, activation, slopes, dropout):
        jax.debug.callback(
            lambda keys, index: seen.append((keys, index)), dropout.keys, index, ordered=True
        )
        return h

    def run(params):
        return run_stack(
            params["layers"],
            H,
            AttentionContext(jnp.tile(jnp.arange(T), (B, 1))),
            WEIGHTS,
            draws=draws,
            config=config,
            operations=Operations(experts=spy),
            policy=Policy(compute="float32"),
            stack=StackConfig(is_scanned=is_scanned, remat="none"),
        )[0]

    jax.block_until_ready(jax.jit(run)(init_params(config, jax.random.key(0), "float32")))
    jax.effects_barrier()
    assert len(seen) == 2
    for number, (keys, index) in enumerate(seen):
        np.testing.assert_array_equal(
            keys, draws.at(1 + number).streams(EXPERT, jnp.asarray(index))
        )
