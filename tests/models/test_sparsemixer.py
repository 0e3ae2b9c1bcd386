"""SparseMixer's masks, draws and estimators against the papers' formulas, every draw enumerated."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.config import ModelConfig
from jaxscale.models.moe import feed_forward
from jaxscale.models.router import route
from jaxscale.models.sparsemixer import ESTIMATORS, Selection, kept, multiplier, sparsemixer
from jaxscale.ops import moe
from jaxscale.ops.draws import Draws, uniform
from jaxscale.ops.operations import Operations

D, E = 3, 5
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
    expert_dim=4,
    router="sparsemixer_v2",
    router_threshold=0.4,
)
Z = np.array([0.9, 1.0, 0.5, -0.4, 0.7])  # at a threshold of 0.4 the fourth is never drawn
OUTPUTS = np.random.default_rng(0).normal(size=(E, D))
TARGET = np.array([0.3, -0.5, 0.8])
RNG = np.random.default_rng(1)
LOW, HIGH = 1e-6, 1 - 2.0**-24


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Forced:
    """Draws that make each pick a given expert, and c = 1 or not."""

    def __init__(self, picks, ones):
        self.values = np.full((1, 1, len(picks), E + 1), LOW)
        for number, (pick, one) in enumerate(zip(picks, ones, strict=True)):
            self.values[0, 0, number, pick] = HIGH
            self.values[0, 0, number, E] = LOW if one else HIGH
        self.keys = np.zeros((1, 1, 2))

    def numbers(self, purpose, num):
        assert num == self.values[0, 0].size
        return jnp.asarray(self.values).reshape(1, 1, -1)


def config_of(router, num_active=1, **changes):
    return dataclasses.replace(CONFIG, router=router, num_active_experts=num_active, **changes)


def masked_softmax(z, available, config, temperature):
    """Equation 2 by hand."""
    top, r = max(z[available]), config.router_threshold
    keep = [i for i in range(E) if i in available and top - z[i] <= r * (abs(z[i]) + abs(top))]
    odds = np.zeros(E)
    odds[keep] = np.exp(z[keep] / temperature)
    return odds / odds.sum()


def smooth(y):
    return jnp.sin(y @ TARGET) + 0.1 * (y**2).sum()


def draws_of(config):
    """(probability, picks, ones, the masked softmax of each draw) of every draw there is."""
    estimator = ESTIMATORS[config.router]

    def extend(picks, ones, ps, chance):
        if len(picks) == config.num_active_experts:
            yield chance, picks, ones, ps
            return
        p = masked_softmax(
            Z, [i for i in range(E) if i not in picks], config, estimator.temperature
        )
        for pick, one in itertools.product(np.flatnonzero(p), (True, False)):
            of_one = estimator.chance if one else 1 - estimator.chance
            yield from extend((*picks, pick), (*ones, one), (*ps, p), chance * p[pick] * of_one)

    return list(extend((), (), (), 1.0))


CASES = [
    ("sparsemixer", 1),
    ("sparsemixer_v2", 1),
    ("sparsemixer_v2", 2),
    ("sparsemixer_v2_star", 2),
]


@pytest.mark.parametrize("router, num_active", CASES)
def test_the_expected_gradient_over_all_draws_is_the_closed_form(router, num_active):
    """Equation 8 with Euler's rule for the most probable expert and the variant's quadrature for the others."""
    config, estimator = config_of(router, num_active), ESTIMATORS[router]

    def loss(z, numbers):
        forced = Forced((0,) * num_active, (True,) * num_active)
        forced.values = numbers
        index, gates, _, _ = sparsemixer(z[None, None], forced, config)
        return smooth((gates[0, 0, :, None] * jnp.asarray(OUTPUTS)[index[0, 0]]).sum(0)), index[
            0, 0
        ]

    run = jax.jit(jax.grad(loss, has_aux=True))
    got, wanted, total = np.zeros(E), np.zeros(E), 0
    for chance, picks, ones, ps in draws_of(config):
        gradient, index = run(jnp.asarray(Z), jnp.asarray(Forced(picks, ones).values))
        assert tuple(index) == picks
        got += chance * np.asarray(gradient)
        c = [
            1 if one or i == p.argmax() else estimator.fraction
            for i, one, p in zip(picks, ones, ps, strict=True)
        ]
        y = sum(each * p[i] * OUTPUTS[i] for each, i, p in zip(c, picks, ps, strict=True))
        slope = np.asarray(jax.grad(smooth)(jnp.asarray(y)))
        for i, p in zip(picks, ps, strict=True):
            dp = p[i] * (np.eye(E)[i] - p) / estimator.temperature
            wanted += chance * estimator.slope * dp * (slope @ OUTPUTS[i])
        total += chance
    assert abs(total - 1) < 1e-12
    np.testing.assert_allclose(got, wanted, atol=1e-6 * np.abs(wanted).max())
    assert np.abs(wanted).max() > 1e-2


def expected(f, estimator, z):
    """The expected gradient of one draw where c is always drawn, for the most probable expert too."""

    @jax.jit
    @jax.grad
    def gradient(z, i, c):
        selection = Selection(
            jnp.full((1, 1), i), jax.nn.softmax(z / estimator.temperature)[None, None]
        )
        slope = jnp.asarray(estimator.slope / estimator.temperature)
        return f(
            multiplier(z[None, None], selection, jnp.full((1, 1), c), slope)[0, 0]
            * jnp.asarray(OUTPUTS)[i]
        )

    p = jax.nn.softmax(z / estimator.temperature)
    choices = (1.0, estimator.chance), (estimator.fraction, 1 - estimator.chance)
    return sum(p[i] * chance * gradient(z, i, c) for i in range(E) for c, chance in choices)


def numeric(f, z, eps=1e-5):
    f = jax.jit(f)
    return np.array([(f(z + eps * e) - f(z - eps * e)) / (2 * eps) for e in np.eye(E)])


@pytest.mark.parametrize("router", ESTIMATORS)
def test_the_quadrature_is_the_gradient_of_the_papers_objective(router):
    """v2: equation 7, p inside f fixed; v1 and v2*: equation 6. Exact for a loss of the degree the rule integrates."""
    estimator, z = ESTIMATORS[router], jnp.asarray(Z)

    def polynomial(y):
        u = y @ TARGET
        return u + u**2 + (0 if router == "sparsemixer" else 2 * u**3)

    def objective(f, z):
        p = jax.nn.softmax(z / estimator.temperature)
        inside = jax.nn.softmax(jnp.asarray(Z)) if router == "sparsemixer_v2" else p
        return sum(p[i] * f(inside[i] * OUTPUTS[i]) for i in range(E))

    wanted = numeric(lambda z: objective(polynomial, z), z)
    np.testing.assert_allclose(expected(polynomial, estimator, z), wanted, atol=1e-9)
    wanted = numeric(lambda z: objective(smooth, z), z)
    error = np.linalg.norm(expected(smooth, estimator, z) - wanted) / np.linalg.norm(wanted)
    assert error < (1e-2 if router == "sparsemixer" else 1e-3)


@pytest.mark.parametrize("convention", ["paper", "released"])
@pytest.mark.parametrize(
    "router, num_active", [("sparsemixer", 1), ("sparsemixer_v2", 2), ("sparsemixer_v2_star", 2)]
)
def test_gradients_of_experts_are_those_of_the_literal_formula(router, num_active, convention):
    """y = s h + stop_gradient(c h - s h), or y = c h: by the dispatch, by its twin and by plain autodiff."""
    config, estimator = (
        config_of(router, num_active, router_expert_gradient=convention),
        ESTIMATORS[router],
    )
    x = jnp.asarray(RNG.normal(size=(1, 1, D)))
    weights = {
        name: jnp.asarray(RNG.normal(size=(E, *shape)))
        for name, shape in {"up": (D, 4), "down": (4, D)}.items()
    }
    picks = (0, 2)[:num_active]
    mixture = sparsemixer(jnp.asarray(Z)[None, None], Forced(picks, (False,) * num_active), config)
    ps, left = [], list(range(E))
    for i in picks:
        ps.append(masked_softmax(Z, left, config, estimator.temperature)[i])
        left.remove(i)

    def literal(weights):
        y = 0
        for i, p in zip(picks, ps, strict=True):
            h = p * (jax.nn.gelu(x @ weights["up"][i]) @ weights["down"][i])
            s, c = estimator.slope, estimator.fraction
            y = y + (
                s * h + jax.lax.stop_gradient(c * h - s * h) if convention == "paper" else c * h
            )
        return jnp.sin(y).sum()

    def ours(weights, experts):
        index, gates, slopes, _ = mixture
        return jnp.sin(experts(x, index, gates, weights, "gelu", slopes)).sum()

    wanted = jax.jit(jax.value_and_grad(literal))(weights)
    for experts in (moe.experts, moe.reference):
        got = jax.jit(jax.value_and_grad(functools.partial(ours, experts=experts)))(weights)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10), got, wanted)


draw = jax.jit(sparsemixer, static_argnums=2)


def random_logits(tokens):
    return jnp.asarray(np.random.default_rng(3).normal(size=(1, tokens, E)))


def random_draws(tokens):
    return Draws(
        jnp.asarray(np.random.default_rng(4).integers(0, 2**32, (1, tokens, 2)), jnp.uint32), 3
    )


@pytest.mark.parametrize("router", ["sparsemixer_v2", "sparsemixer_v2_star"])
def test_without_draws_the_largest_logits_are_taken_and_c_is_one(router):
    config, z = config_of(router, 2), random_logits(64)
    index, gates, slopes, _ = draw(z, None, config)
    np.testing.assert_array_equal(index, jax.lax.top_k(z, 2)[1])
    for t in range(64):
        left = list(range(E))
        for i, gate in zip(np.asarray(index[0, t]), gates[0, t], strict=True):
            p = masked_softmax(np.asarray(z[0, t]), left, config, ESTIMATORS[router].temperature)
            np.testing.assert_allclose(gate, p[i], rtol=1e-12)
            left.remove(i)
    assert slopes is None


def test_no_two_draws_of_a_token_are_one_expert_and_each_comes_as_often_as_it_should():
    config = config_of("sparsemixer_v2", 2)
    z = jnp.broadcast_to(jnp.asarray(Z), (1, 20000, E))
    index = np.asarray(draw(z, random_draws(20000), config).index[0])
    assert (index[:, 0] != index[:, 1]).all()
    p = masked_softmax(Z, list(range(E)), config, 1)
    np.testing.assert_allclose(np.bincount(index[:, 0], minlength=E) / 20000, p, atol=0.015)
    second = sum(
        p[i] * masked_softmax(Z, [j for j in range(E) if j != i], config, 1)
        for i in np.flatnonzero(p)
    )
    np.testing.assert_allclose(np.bincount(index[:, 1], minlength=E) / 20000, second, atol=0.015)


def test_c_is_one_for_the_most_probable_expert_and_one_in_four_times_for_another():
    config = config_of("sparsemixer_v2")
    z = jnp.broadcast_to(jnp.asarray(Z), (1, 20000, E))
    index, gates, _, _ = (np.asarray(each) for each in draw(z, random_draws(20000), config))
    c = gates[0, :, 0] / masked_softmax(Z, list(range(E)), config, 1)[index[0, :, 0]]
    most = index[0, :, 0] == Z.argmax()
    np.testing.assert_allclose(c[most], 1)
    values, counts = np.unique(c[~most].round(6), return_counts=True)
    np.testing.assert_allclose(values, [1 / 3, 1], atol=1e-6)
    np.testing.assert_allclose(counts[1] / counts.sum(), 0.25, atol=0.015)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_equal_logits_are_all_kept_and_the_first_is_the_most_probable(form):
    config = config_of("sparsemixer_v2", 2, router_mask=form, router_threshold=0.01)
    for value in (0.0, 2.0, -3.0):
        z = jnp.full((1, 4000, E), value)
        assert kept(z, jnp.ones(z.shape, bool), threshold=0.01, form=form).all()
        index, gates, _, _ = draw(z, None, config)
        assert (index == jnp.asarray([0, 1])).all()
        np.testing.assert_allclose(gates[0, 0], [1 / E, 1 / (E - 1)])
        index = np.asarray(draw(z, random_draws(4000), config).index[0])
        np.testing.assert_allclose(np.bincount(index[:, 0]) / 4000, 1 / E, atol=0.03)
    assert np.isfinite(gates).all()


def test_the_two_masks_differ_where_the_magnitudes_do():
    """Paper: 1 - z <= r (|z| + 1). Code: 1 - z <= 2 r max(|z|, 1), and with a negative top 2 r |z|."""
    everything = jnp.ones((1, 1, 2), bool)
    for z, paper, released in [
        ((1.0, 0.5), False, True),
        ((-1.0, -1.9), False, True),
        ((1.0, 0.7), True, True),
    ]:
        z = jnp.asarray(z)[None, None]
        assert bool(kept(z, everything, threshold=0.3, form="paper")[0, 0, 1]) is paper
        assert bool(kept(z, everything, threshold=0.3, form="released")[0, 0, 1]) is released


def test_the_second_mask_is_made_of_the_remaining_logits():
    config = config_of("sparsemixer_v2", 2, router_threshold=0.05)
    z = jnp.asarray([9.0, 1.0, 0.99, -5.0, -6.0])[None, None]
    _, gates, _, _ = sparsemixer(z, None, config)
    odds = np.exp([1.0, 0.99])
    np.testing.assert_allclose(gates[0, 0], [1, odds[0] / odds.sum()], rtol=1e-12)


def test_the_masked_sampling_router_draws_the_same_experts_and_gates_them_conventionally():
    z, draws = random_logits(64), random_draws(64)
    index, gates, slopes, _ = jax.jit(route, static_argnums=2)(
        z, draws, config_of("masked_sampling", 2)
    )
    np.testing.assert_array_equal(index, draw(z, draws, config_of("sparsemixer_v2", 2)).index)
    odds = np.exp(np.take_along_axis(np.asarray(z), np.asarray(index), -1))
    np.testing.assert_allclose(gates, odds / odds.sum(-1, keepdims=True), rtol=1e-12)
    assert slopes is None


def test_nothing_but_a_kept_expert_is_ever_drawn_even_by_the_largest_numbers():
    """A number that gives one expert a chance of 1 and another the smallest."""
    config = config_of("sparsemixer_v2", 2, router_threshold=0.0)
    largest = jnp.asarray(np.full((1, 1, 2 * (E + 1), 2), 2**32 - 1), jnp.uint32)
    z = jnp.asarray(Z, jnp.float32)[None, None]

    class Largest(Draws):
        def numbers(self, purpose, num):
            return uniform(largest.reshape(1, 1, -1)[..., :num])

    index, gates, _, _ = sparsemixer(z, Largest(jnp.zeros((1, 1, 2), jnp.uint32)), config)
    assert tuple(index[0, 0]) == (1, 0) and tuple(gates[0, 0]) == (1, 1)


@pytest.mark.parametrize("num_active", [1, 2])
def test_densemixer_is_gshard_whose_router_learns_from_every_expert(num_active):
    """Its router's gradient is that of a gate for every expert, those not chosen divided by a fixed sum."""
    config, x = config_of("densemixer", num_active), jnp.asarray(RNG.normal(size=(1, 1, D)))
    weights = {
        "up": jnp.asarray(RNG.normal(size=(E, D, 4))),
        "down": jnp.asarray(RNG.normal(size=(E, 4, D))),
    }
    z = jnp.asarray(Z)[None, None]

    def ours(z, weights, router):
        draws = Draws(jnp.zeros((1, 1, 2), jnp.uint32))
        index, gates, slopes, _ = route(z, draws, dataclasses.replace(config, router=router))
        return jnp.sin(moe.experts(x, index, gates, weights, "gelu", slopes)).sum()

    def literal(z):
        p = jax.nn.softmax(z[0, 0])
        chosen = np.isin(np.arange(E), np.argsort(-Z)[:num_active])
        total = (p * chosen).sum() if num_active > 1 else 1.0
        gate = jnp.where(chosen, p / total, p / jax.lax.stop_gradient(total))
        gate = gate - jax.lax.stop_gradient(gate * ~chosen)
        outputs = jnp.stack(
            [jax.nn.gelu(x[0, 0] @ weights["up"][e]) @ weights["down"][e] for e in range(E)]
        )
        return jnp.sin(gate @ outputs).sum()

    run = jax.jit(jax.value_and_grad(ours, (0, 1)), static_argnums=2)
    value, (dz, dweights) = run(z, weights, "densemixer")
    wanted, (dz_gshard, dweights_gshard) = run(z, weights, "gshard")
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, atol=1e-12), dweights, dweights_gshard
    )
    np.testing.assert_allclose(dz, jax.jit(jax.grad(literal))(z), atol=1e-12)
    assert np.abs(dz - dz_gshard).max() > 1e-3


@pytest.mark.parametrize("router", ["densemixer", "masked_sampling"])
def test_a_router_that_is_gshard_without_draws_counts_the_chosen_only(router):
    config, z = config_of(router, 2), random_logits(8)
    index, gates, _, _ = route(z, None, config)
    wanted = route(z, None, config_of("gshard", 2))
    np.testing.assert_array_equal(index, wanted.index)
    np.testing.assert_array_equal(gates, wanted.gates)
    params = {
        "router": jnp.eye(D, E),
        "experts": {"up": jnp.ones((E, D, 4)), "gate": jnp.ones((E, D, 4))},
    }
    params["experts"]["down"] = jnp.ones((E, 4, D))
    for draws in (None, random_draws(8)):
        run = jax.jit(functools.partial(feed_forward, config=config, operations=Operations()))
        _, sums = run(params, jnp.ones((1, 8, D)), jnp.ones((1, 8)), draws=draws)
        assert sums.load.sum() == 16


def test_a_sparsemixer_of_the_first_version_scales_its_output():
    config = config_of("sparsemixer")
    params = {"router": jnp.eye(D, E), "omega": jnp.asarray([1.0, 2.0, -1.0]), "experts": {}}
    params["experts"] |= {n: jnp.asarray(RNG.normal(size=(E, D, 4))) for n in ("up", "gate")}
    params["experts"]["down"] = jnp.asarray(RNG.normal(size=(E, 4, D)))
    h = jnp.asarray(RNG.normal(size=(1, 8, D)))
    run = jax.jit(functools.partial(feed_forward, config=config, operations=Operations()))
    y, _ = run(params, h, jnp.ones((1, 8)))
    plain = {name: value for name, value in params.items() if name != "omega"}
    wanted, _ = run(plain, h, jnp.ones((1, 8)))
    np.testing.assert_allclose(y, params["omega"] * wanted)
