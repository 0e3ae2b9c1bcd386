"""The router, its gates and its losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.config import ExpertsConfig, TopKRouter
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder, Tokens
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.moe import Choices, experts, router_sums
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.models.router import route, router_logits
from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.backends import Backends, Operations
from jaxscale.ops.draws import EXPERT, Draws
from jaxscale.ops.precision import Policy

B, T, D, E = 2, 5, 8, 4
CONFIG = ExpertsConfig(num_experts=E, dim=6, balance_loss=0.5, z_loss=0.25)
H = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
ROUTER = {"router": jnp.asarray(np.random.default_rng(1).normal(size=(D, E)), jnp.float32)}
WEIGHTS = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], jnp.float32)
NONE_CHOSEN = jnp.zeros((B, T, E))
FIRST_CHOSEN = jnp.zeros((B, T, 1), int)


def routed(h, config=CONFIG):
    """Experts, gates and logits of a router without draws."""
    logits = router_logits(ROUTER, h)
    routing = route(logits, None, config)
    return routing.index, routing.gates, logits


@jax.jit
def sums_of(index, logits, weights):
    return router_sums(Choices(index, logits), weights, CONFIG, Operations())


@pytest.mark.parametrize("is_renormalised", [True, False])
def test_gates_are_the_softmax_over_the_chosen_or_over_all(is_renormalised):
    router = TopKRouter(is_renormalised=is_renormalised)
    index, gates, logits = routed(H, ExpertsConfig(num_experts=E, dim=6, router=router))
    for b, t in np.ndindex(B, T):
        odds = np.exp(np.asarray(logits[b, t]))
        wanted = np.argsort(-odds)[:2]
        assert list(index[b, t]) == list(wanted)
        total = odds[wanted].sum() if is_renormalised else odds.sum()
        np.testing.assert_allclose(gates[b, t], odds[wanted] / total, rtol=1e-5)


def test_routing_in_bfloat16_keeps_float32_logits():
    _, gates, logits = jax.jit(routed)(H.astype(jnp.bfloat16))
    assert gates.dtype == logits.dtype == jnp.float32


def test_logits_of_bfloat16_tokens_are_those_of_the_float32_router():
    rng = np.random.default_rng(2)
    h = jnp.asarray(rng.normal(size=(1, 8, 2048)), jnp.bfloat16)
    router = rng.normal(size=(2048, 16)).astype("float32")
    wanted = np.asarray(h, np.float64) @ router.astype(np.float64)
    got = jax.jit(router_logits)({"router": jnp.asarray(router)}, h)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_balance_loss_is_its_weight_when_balanced_and_more_when_not():
    spread = (jnp.arange(B * T).reshape(B, T, 1) * 2 + jnp.arange(2)) % E
    balanced = sums_of(spread, NONE_CHOSEN, jnp.ones((B, T)))
    np.testing.assert_allclose(balanced.balance, 0.5 * B * T, rtol=1e-6)
    collapsed = sums_of(FIRST_CHOSEN, NONE_CHOSEN.at[..., 0].set(50.0), WEIGHTS)
    np.testing.assert_allclose(collapsed.balance, 0.5 * E * WEIGHTS.sum(), rtol=1e-6)
    np.testing.assert_allclose(collapsed.z, 0.25 * 50.0**2 * WEIGHTS.sum(), rtol=1e-6)


def test_padding_is_in_no_figure():
    index, _, logits = routed(H)
    is_token = WEIGHTS[..., None] > 0
    sums = sums_of(index, logits, WEIGHTS)
    changed = sums_of(jnp.where(is_token, index, 3), jnp.where(is_token, logits, 9.0), WEIGHTS)
    jax.tree.map(np.testing.assert_allclose, sums, changed)
    assert sums.load.sum() == 2 * WEIGHTS.sum()
    nothing = sums_of(index, logits, 0 * WEIGHTS)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(nothing))


def test_small_weights_scale_the_losses():
    index, _, logits = routed(H)
    whole, part = (sums_of(index, logits, factor * WEIGHTS) for factor in (1, 0.001))
    jax.tree.map(lambda p, w: np.testing.assert_allclose(p, 0.001 * w, rtol=1e-5), part, whole)


def test_the_balance_loss_pushes_away_from_the_loaded_expert():
    gradient = jax.grad(lambda logits: sums_of(FIRST_CHOSEN, logits, WEIGHTS).balance)
    of_logits = np.asarray(gradient(NONE_CHOSEN))[np.asarray(WEIGHTS) > 0]
    assert (of_logits[:, 0] > 0).all()
    assert (of_logits[:, 1:] < 0).all()


@pytest.mark.parametrize("num_active", [1, 2])
def test_the_output_teaches_the_router(num_active):
    """Top-1 too: a gate that was renormalised to 1 would give no gradient."""
    config = ExpertsConfig(num_experts=E, dim=6, num_active=num_active)
    rng = np.random.default_rng(2)
    matrices = {
        name: jnp.asarray(rng.normal(size=(E, *shape)), jnp.float32)
        for name, shape in {"up": (D, 6), "gate": (D, 6), "down": (6, D)}.items()
    }

    def loss(router):
        params = {"router": router, "experts": matrices}
        y, _ = experts(params, H, config, Operations())
        return (y**2).sum()

    assert jnp.abs(jax.jit(jax.grad(loss))(ROUTER["router"])).max() > 1e-2


@pytest.mark.parametrize("is_scanned", [pytest.param(False, marks=pytest.mark.long), True])
def test_every_layer_draws_for_itself(is_scanned):
    """What is dropped depends on the layer's number in the model, dense ones before it counted."""
    config = from_flat(
        vocab_size=8,
        num_layers=3,
        model_dim=D,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        ffn_dim=8,
        max_length=8,
        num_dense_prefix=1,
        moe_pattern=(True,),
        num_experts=E,
        expert_dim=6,
        router="sparsemixer_v2",
        router_threshold=1.0,
        expert_dropout=0.5,
    )
    draws = Draws(jnp.asarray(np.random.default_rng(2).integers(0, 2**32, (B, T, 2)), jnp.uint32))
    seen = []

    def spy(h, index, gates, weights, activation, slopes, dropout):
        def note(keys, index):
            seen.append((keys, index))

        jax.debug.callback(note, dropout.keys, index, ordered=True)
        return h

    decoder = Decoder(
        config,
        Operations(backends=Backends(experts=spy)),
        Policy(compute="float32"),
        ExecutionConfig(is_scanned=is_scanned, remat="none"),
    )
    shapes = abstract_params(parameter_table(config), "float32")
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype("float32"), shapes)
    tokens = Tokens(AttentionContext(jnp.tile(jnp.arange(T), (B, 1))), WEIGHTS, draws)

    jax.block_until_ready(jax.jit(decoder.run_stack)(params["layers"], H, tokens)[0])
    jax.effects_barrier()
    assert len(seen) == 2
    for number, (keys, index) in enumerate(seen):
        wanted = draws.at(1 + number).streams(EXPERT, jnp.asarray(index))
        np.testing.assert_array_equal(keys, wanted)
