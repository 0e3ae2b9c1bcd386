"""SparseMixer's masks, draws and estimators against the papers' formulas, every draw enumerated."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.models.config import ExpertsConfig, SparseMixerRouter
from jaxscale.models.moe import experts as run_experts
from jaxscale.models.sparsemixer import (
    ESTIMATORS,
    Selection,
    may_be_drawn,
    multiplier,
    sparsemixer,
)
from jaxscale.ops import moe
from jaxscale.ops.backends import Operations
from jaxscale.ops.draws import Draws, uniform

D, E = 3, 5
Z = np.array([0.9, 1.0, 0.5, -0.4, 0.7])  # at a threshold of 0.4 the fourth is never drawn
OUTPUTS = np.random.default_rng(0).normal(size=(E, D))
TARGET = np.array([0.3, -0.5, 0.8])
RNG = np.random.default_rng(1)
LOW, HIGH = 1e-6, 1 - 2.0**-24
DRAWN = 4096  # tokens whose frequencies are compared


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


def config_of(version, num_active=1, *, threshold=0.4, **fields):
    router = SparseMixerRouter(threshold, version=version, **fields)
    return ExpertsConfig(num_experts=E, dim=4, num_active=num_active, router=router)


def matrices(*names):
    """Random matrices of all experts."""
    shapes = {"up": (E, D, 4), "gate": (E, D, 4), "down": (E, 4, D)}
    return {name: jnp.asarray(RNG.normal(size=shapes[name])) for name in names}


def masked_softmax(z, available, config, temperature):
    """Equation 2 by hand."""
    top, r = max(z[available]), config.router.threshold
    keep = [i for i in range(E) if i in available and top - z[i] <= r * (abs(z[i]) + abs(top))]
    odds = np.zeros(E)
    odds[keep] = np.exp(z[keep] / temperature)
    return odds / odds.sum()


def left_of(picks):
    return [i for i in range(E) if i not in picks]


def smooth(y):
    return jnp.sin(y @ TARGET) + 0.1 * (y**2).sum()


def draws_of(config):
    """(probability, picks, ones, the masked softmax of each draw) of every draw there is."""
    estimator = ESTIMATORS[config.router.version]

    def extend(picks, ones, ps, chance):
        if len(picks) == config.num_active:
            yield chance, picks, ones, ps
            return
        p = masked_softmax(Z, left_of(picks), config, estimator.temperature)
        for pick, one in itertools.product(np.flatnonzero(p), (True, False)):
            of_one = estimator.probability if one else 1 - estimator.probability
            yield from extend((*picks, pick), (*ones, one), (*ps, p), chance * p[pick] * of_one)

    return list(extend((), (), (), 1.0))


@pytest.mark.parametrize("version, num_active", [("v1", 1), ("v2", 1), ("v2", 2), ("v2_star", 2)])
def test_the_expected_gradient_over_all_draws_is_the_closed_form(version, num_active):
    """Equation 8: Euler's rule for the most probable expert, a quadrature for the others."""
    config, estimator = config_of(version, num_active), ESTIMATORS[version]

    def loss(z, numbers):
        forced = Forced((0,) * num_active, (True,) * num_active)
        forced.values = numbers
        routing = sparsemixer(z[None, None], forced, config)
        index, gates = routing.index[0, 0], routing.gates[0, 0]
        return smooth((gates[:, None] * jnp.asarray(OUTPUTS)[index]).sum(0)), index

    run = jax.jit(jax.grad(loss, has_aux=True))
    slope_of = jax.jit(jax.grad(smooth))
    got, wanted, total = np.zeros(E), np.zeros(E), 0
    for chance, picks, ones, ps in draws_of(config):
        gradient, index = run(jnp.asarray(Z), jnp.asarray(Forced(picks, ones).values))
        assert tuple(index) == picks
        got += chance * np.asarray(gradient)
        y = 0
        for i, one, p in zip(picks, ones, ps, strict=True):
            c = 1 if one or i == p.argmax() else estimator.fraction
            y = y + c * p[i] * OUTPUTS[i]
        slope = np.asarray(slope_of(jnp.asarray(y)))
        for i, p in zip(picks, ps, strict=True):
            dp = p[i] * (np.eye(E)[i] - p) / estimator.temperature
            wanted += chance * estimator.slope * dp * (slope @ OUTPUTS[i])
        total += chance
    assert abs(total - 1) < 1e-12
    np.testing.assert_allclose(got, wanted, atol=1e-6 * np.abs(wanted).max())
    assert np.abs(wanted).max() > 1e-2


def expected(f, estimator, z):
    """The expected gradient of a draw where c is drawn for the most probable expert too."""

    def gradient(z, i, c):
        selection = Selection(
            jnp.full((1, 1), i), jax.nn.softmax(z / estimator.temperature)[None, None]
        )
        slope = jnp.asarray(estimator.slope / estimator.temperature)
        gate = multiplier(z[None, None], selection, jnp.full((1, 1), c), slope)[0, 0]
        return f(gate * jnp.asarray(OUTPUTS)[i])

    p = jax.nn.softmax(z / estimator.temperature)
    choices = (1.0, estimator.probability), (estimator.fraction, 1 - estimator.probability)
    cases = [(i, c, p[i] * chance) for i in range(E) for c, chance in choices]
    experts, cs, weights = (jnp.asarray(column) for column in zip(*cases))
    gradients = jax.jit(jax.vmap(jax.grad(gradient), (None, 0, 0)))(z, experts, cs)
    return weights @ gradients


def numeric(f, z, eps=1e-5):
    steps = eps * np.concatenate([np.eye(E), -np.eye(E)])
    ahead, behind = jnp.split(jax.jit(jax.vmap(f))(z + steps), 2)
    return np.asarray(ahead - behind) / (2 * eps)


@pytest.mark.parametrize("version", ESTIMATORS)
def test_the_quadrature_is_the_gradient_of_the_papers_objective(version):
    """v2: equation 7, p inside f fixed; v1 and v2*: equation 6.

    Exact for a loss of the degree that the rule integrates.
    """
    estimator, z = ESTIMATORS[version], jnp.asarray(Z)

    def polynomial(y):
        u = y @ TARGET
        return u + u**2 + (0 if version == "v1" else 2 * u**3)

    def objective(f, z):
        p = jax.nn.softmax(z / estimator.temperature)
        inside = jax.nn.softmax(jnp.asarray(Z)) if version == "v2" else p
        return sum(p[i] * f(inside[i] * OUTPUTS[i]) for i in range(E))

    wanted = numeric(lambda z: objective(polynomial, z), z)
    np.testing.assert_allclose(expected(polynomial, estimator, z), wanted, atol=1e-9)
    wanted = numeric(lambda z: objective(smooth, z), z)
    error = np.linalg.norm(expected(smooth, estimator, z) - wanted) / np.linalg.norm(wanted)
    assert error < (1e-2 if version == "v1" else 1e-3)


@pytest.mark.parametrize(
    "version, num_active, convention",
    [
        ("v1", 1, "paper"),
        ("v2", 2, "paper"),
        ("v2", 2, "released"),
        ("v2_star", 2, "paper"),
        pytest.param("v1", 1, "released", marks=pytest.mark.long),
        pytest.param("v2_star", 2, "released", marks=pytest.mark.long),
    ],
)
def test_gradients_of_experts_are_those_of_the_literal_formula(version, num_active, convention):
    """y = s h + stop_gradient(c h - s h), or y = c h: by the dispatch, its twin and autodiff."""
    config = config_of(version, num_active, expert_gradient=convention)
    estimator = ESTIMATORS[version]
    x = jnp.asarray(RNG.normal(size=(1, 1, D)))
    weights = matrices("up", "down")
    picks = (0, 2)[:num_active]
    forced = Forced(picks, (False,) * num_active)
    routing = jax.jit(lambda z: sparsemixer(z, forced, config))(jnp.asarray(Z)[None, None])
    ps = []
    for number, i in enumerate(picks):
        p = masked_softmax(Z, left_of(picks[:number]), config, estimator.temperature)
        ps.append(p[i])

    def literal(weights):
        y = 0
        for i, p in zip(picks, ps, strict=True):
            h = p * (jax.nn.gelu(x @ weights["up"][i]) @ weights["down"][i])
            s, c = estimator.slope, estimator.fraction
            shifted = s * h + jax.lax.stop_gradient(c * h - s * h)
            y = y + (shifted if convention == "paper" else c * h)
        return jnp.sin(y).sum()

    def ours(experts):
        def loss(weights):
            y = experts(x, routing.index, routing.gates, weights, "gelu", routing.slopes)
            return jnp.sin(y).sum()

        return loss

    losses = [literal, ours(moe.experts), ours(moe.reference)]
    run = jax.jit(lambda weights: [jax.value_and_grad(loss)(weights) for loss in losses])
    wanted, *found = run(weights)
    for got in found:
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10), got, wanted)


draw = jax.jit(sparsemixer, static_argnums=2)


def random_logits(tokens):
    return jnp.asarray(np.random.default_rng(3).normal(size=(1, tokens, E)))


def random_draws(tokens):
    keys = np.random.default_rng(4).integers(0, 2**32, (1, tokens, 2))
    return Draws(jnp.asarray(keys, jnp.uint32), 3)


@pytest.mark.parametrize("version", ["v2", "v2_star"])
def test_without_draws_the_largest_logits_are_taken_and_c_is_one(version):
    config, z = config_of(version, 2), np.asarray(random_logits(64))
    index, gates, slopes, _ = jax.tree.map(np.asarray, draw(jnp.asarray(z), None, config))
    np.testing.assert_array_equal(index, np.argsort(-z, -1)[..., :2])
    for t in range(64):
        for number, (i, gate) in enumerate(zip(index[0, t], gates[0, t], strict=True)):
            left = left_of(index[0, t, :number])
            p = masked_softmax(z[0, t], left, config, ESTIMATORS[version].temperature)
            np.testing.assert_allclose(gate, p[i], rtol=1e-12)
    assert slopes is None


@pytest.mark.parametrize("version", ESTIMATORS)
def test_without_draws_the_gradient_is_that_of_the_gate_itself(version):
    """Of the softmax over the experts that may be drawn, at the version's temperature."""
    config, temperature = config_of(version), ESTIMATORS[version].temperature
    z = jnp.asarray(random_logits(8))

    def gates(z):
        return draw(z, None, config).gates.sum()

    def of_softmax(z):
        keep = may_be_drawn(z, jnp.ones(z.shape, bool), threshold=0.4, form="paper")
        return jax.nn.softmax(jnp.where(keep, z / temperature, -jnp.inf)).max(-1).sum()

    np.testing.assert_allclose(gates(z), of_softmax(z), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(gates)(z), jax.grad(of_softmax)(z), atol=1e-12)


@functools.cache
def drawn(num_active):
    """Experts and gates [tokens, A] of many tokens with the same logits."""
    z = jnp.broadcast_to(jnp.asarray(Z), (1, 4 * DRAWN, E))
    routing = draw(z, random_draws(4 * DRAWN), config_of("v2", num_active))
    return np.asarray(routing.index[0]), np.asarray(routing.gates[0])


def frequencies(index):
    return np.bincount(index, minlength=E) / len(index)


def test_no_two_draws_of_a_token_are_one_expert_and_each_comes_as_often_as_it_should():
    config, (index, _) = config_of("v2", 2), drawn(2)
    assert (index[:, 0] != index[:, 1]).all()
    p = masked_softmax(Z, left_of(()), config, 1)
    np.testing.assert_allclose(frequencies(index[:, 0]), p, atol=0.015)
    second = sum(p[i] * masked_softmax(Z, left_of([i]), config, 1) for i in np.flatnonzero(p))
    np.testing.assert_allclose(frequencies(index[:, 1]), second, atol=0.015)


def test_c_is_one_for_the_most_probable_expert_and_one_in_four_times_for_another():
    index, gates = drawn(2)
    c = gates[:, 0] / masked_softmax(Z, left_of(()), config_of("v2"), 1)[index[:, 0]]
    is_most_probable = index[:, 0] == Z.argmax()
    np.testing.assert_allclose(c[is_most_probable], 1)
    values, counts = np.unique(c[~is_most_probable].round(6), return_counts=True)
    np.testing.assert_allclose(values, [1 / 3, 1], atol=1e-6)
    np.testing.assert_allclose(counts[1] / counts.sum(), 0.25, atol=0.015)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_equal_logits_are_all_kept_and_the_first_is_the_most_probable(form):
    config = config_of("v2", 2, mask=form, threshold=0.01)
    draws = random_draws(DRAWN)
    for value in (0.0, 2.0, -3.0):
        z = jnp.full((1, DRAWN, E), value)
        assert may_be_drawn(z, z == value, threshold=0.01, form=form).all()
        routing = draw(z, None, config)
        assert (np.asarray(routing.index) == [0, 1]).all()
        gates = np.asarray(routing.gates)
        np.testing.assert_allclose(gates[0, 0], [1 / E, 1 / (E - 1)])
        assert np.isfinite(gates).all()
        index = np.asarray(draw(z, draws, config).index[0])
        np.testing.assert_allclose(frequencies(index[:, 0]), 1 / E, atol=0.03)


def test_the_two_masks_differ_where_the_magnitudes_do():
    """Paper: 1 - z <= r (|z| + 1). Code: 1 - z <= 2 r max(|z|, 1); with a negative top 2 r |z|."""
    z = jnp.asarray([(1.0, 0.5), (-1.0, -1.9), (1.0, 0.7)])[None]
    everything = jnp.ones(z.shape, bool)
    wanted = {"paper": [False, False, True], "released": [True, True, True]}
    for form, is_second_kept in wanted.items():
        kept = may_be_drawn(z, everything, threshold=0.3, form=form)
        assert kept[0, :, 1].tolist() == is_second_kept


def test_the_second_mask_is_made_of_the_remaining_logits():
    z = jnp.asarray([9.0, 1.0, 0.99, -5.0, -6.0])[None, None]
    gates = draw(z, None, config_of("v2", 2, threshold=0.05)).gates
    odds = np.exp([1.0, 0.99])
    np.testing.assert_allclose(gates[0, 0], [1, odds[0] / odds.sum()], rtol=1e-12)


def test_nothing_but_a_kept_expert_is_ever_drawn_even_by_the_largest_numbers():
    """A number that gives one expert a chance of 1 and another the smallest."""
    largest = jnp.asarray(np.full((1, 1, 2 * (E + 1)), 2**32 - 1), jnp.uint32)

    class Largest(Draws):
        def numbers(self, purpose, num):
            return uniform(largest[..., :num])

    draws = Largest(jnp.zeros((1, 1, 2), jnp.uint32))
    config, z = config_of("v2", 2, threshold=0.0), jnp.asarray(Z, jnp.float32)[None, None]
    routing = jax.jit(lambda z: sparsemixer(z, draws, config))(z)
    assert tuple(routing.index[0, 0]) == (1, 0)
    assert tuple(routing.gates[0, 0]) == (1, 1)


def test_the_first_version_scales_its_output():
    omega = jnp.asarray([1.0, 2.0, -1.0])
    params = {"router": jnp.eye(D, E), "experts": matrices("up", "gate", "down")}
    h = jnp.asarray(RNG.normal(size=(1, 8, D)))
    run = jax.jit(lambda params: run_experts(params, h, config_of("v1"), Operations())[0])
    plain = run(params | {"omega": jnp.ones(D)})
    np.testing.assert_allclose(run(params | {"omega": omega}), omega * plain)
