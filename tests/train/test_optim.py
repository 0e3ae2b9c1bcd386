"""Schedules at their edges, and each optimizer against a naive one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxscale import tree
from jaxscale.train.optim import OptimizerConfig, make_optimizer, make_schedule
from jaxscale.types import InputError

PEAK = 0.5
DIMS = {
    "embedding": {"tokens": "VD"},
    "layers": {
        "0": {
            "attention": {"q": "LDNH", "o": "LNHD", "q_bias": "LNH", "norm": {"scale": "LD"}},
            "moe": {"router": "LDE", "experts": {"up": "LEDF", "down": "LEFD"}},
        }
    },
}
SIZES = dict(V=7, D=6, N=2, H=4, E=3, F=5, L=2)
DECAYED = {
    "embedding/tokens",
    "layers/0/attention/q",
    "layers/0/attention/o",
    "layers/0/moe/experts/up",
    "layers/0/moe/experts/down",
}


def make_schedule_of(steps, **fields):
    return make_schedule(OptimizerConfig(learning_rate=PEAK, **fields), steps)


def draw(seed):
    """A tree of normal numbers in the shape of DIMS."""
    rng = np.random.default_rng(seed)
    return tree.map_with_path(
        lambda path, d: jnp.float32(rng.normal(size=[SIZES[c] for c in d])), DIMS
    )


def make(name, **fields):
    config = OptimizerConfig(
        name=name, learning_rate=0.1, schedule="wsd", decay_fraction=0.0, **fields
    )
    return make_optimizer(config, steps=10, dims=DIMS)


def train(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(got, wanted, **tolerance):
    for path, leaf in tree.flatten(got).items():
        np.testing.assert_allclose(leaf, wanted[path], err_msg=path, **tolerance)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_rise_from_above_zero_to_the_peak_and_end_at_the_final_fraction(schedule):
    rate = make_schedule_of(
        100, schedule=schedule, warmup_steps=10, final_fraction=0.2, decay_fraction=0.3
    )
    assert rate(0) == pytest.approx(PEAK / 10)
    assert rate(9) == pytest.approx(PEAK)
    assert rate(99) == pytest.approx(0.2 * PEAK)
    rates = np.array([rate(step) for step in range(100)])
    assert (np.diff(rates[:10]) > 0).all() and (np.diff(rates[9:]) <= 1e-7).all()


def test_schedules_have_their_shapes():
    half = (
        10 + (99 - 9) // 2 - 1
    )  # in the middle between the last step of the warm-up and the last of all
    for schedule in ("cosine", "linear"):
        assert make_schedule_of(100, schedule=schedule, warmup_steps=10)(half) == pytest.approx(
            PEAK * 0.55
        )
    quarter = 9 + (half - 9) / 2
    cosine = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert make_schedule_of(100, schedule="cosine", warmup_steps=10)(quarter) == pytest.approx(
        PEAK * cosine
    )
    wsd = make_schedule_of(
        100, schedule="wsd", warmup_steps=10, decay_fraction=0.3, final_fraction=0.0
    )
    assert wsd(10) == wsd(69) == pytest.approx(PEAK)
    assert wsd(84) == pytest.approx(PEAK / 2)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_without_warm_up_the_first_step_is_at_the_peak(schedule):
    rate = make_schedule_of(20, schedule=schedule, final_fraction=0.0)
    assert rate(0) == pytest.approx(PEAK) and rate(19) == pytest.approx(0, abs=1e-7)
    assert make_schedule_of(1, schedule=schedule)(0) == pytest.approx(PEAK)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_warm_up_must_fit(schedule):
    fields = dict(schedule=schedule, decay_fraction=0.0)
    assert make_schedule_of(20, warmup_steps=20, **fields)(19) == pytest.approx(PEAK)
    with pytest.raises(InputError, match=r"warmup_steps: given 21, .*21 \+ 0 > 20"):
        make_schedule_of(20, warmup_steps=21, **fields)


def test_wsd_decay_must_fit_after_the_warm_up():
    with pytest.raises(
        InputError, match=r"warmup_steps \+ decay steps <= steps, but 15 \+ 10 > 20"
    ):
        make_schedule_of(20, schedule="wsd", warmup_steps=15, decay_fraction=0.5)


@pytest.mark.parametrize(
    "fields",
    [
        dict(name="sgd"),
        dict(schedule="step"),
        dict(learning_rate=0.0),
        dict(warmup_steps=-1),
        dict(clip_norm=0.0),
        dict(final_fraction=1.5),
        dict(decayed="("),
        dict(learning_rate=float("nan")),
        dict(clip_norm=float("nan")),
        dict(beta1=1.0),
        dict(beta2=-0.1),
        dict(epsilon=0.0),
        dict(weight_decay=-0.1),
        dict(weight_decay=float("nan")),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        OptimizerConfig(**fields)


def test_a_decay_of_nothing_is_refused():
    with pytest.raises(
        InputError, match=r"OptimizerConfig.decayed: given 'lora', .* one of .*attention/q"
    ):
        make("adamw", decayed="lora", weight_decay=0.1)
    make("adamw", decayed="lora", weight_decay=0.0)


def test_adamw_equals_a_naive_one_and_decays_matrices_only():
    b1, b2, eps, rate, decay = 0.8, 0.9, 1e-6, 0.1, 0.3
    params, gradients = draw(0), [draw(1), draw(2), draw(3)]
    optimizer = make("adamw", beta1=b1, beta2=b2, epsilon=eps, weight_decay=decay, clip_norm=None)
    wanted = {}
    for path, p in tree.flatten(params).items():
        p, m, v = np.float64(p), 0.0, 0.0
        for n, tree_of_gradients in enumerate(gradients, 1):
            g = np.float64(tree.flatten(tree_of_gradients)[path])
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            direction = (m / (1 - b1**n)) / (np.sqrt(v / (1 - b2**n)) + eps)
            p = p - rate * (direction + (decay * p if path in DECAYED else 0))
        wanted[path] = p
    assert_close(train(optimizer, params, gradients), wanted, rtol=2e-5, atol=1e-6)


def test_lion_equals_a_naive_one():
    b1, b2, rate, decay = 0.9, 0.95, 0.1, 0.3
    params, gradients = draw(0), [draw(1), draw(2), draw(3)]
    wanted = {}
    for path, p in tree.flatten(params).items():
        p, m = np.float64(p), 0.0
        for tree_of_gradients in gradients:
            g = np.float64(tree.flatten(tree_of_gradients)[path])
            p = p - rate * (np.sign(b1 * m + (1 - b1) * g) + (decay * p if path in DECAYED else 0))
            m = b2 * m + (1 - b2) * g
        wanted[path] = p
    got = train(
        make("lion", beta1=b1, beta2=b2, weight_decay=decay, clip_norm=None), params, gradients
    )
    assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def newton_schulz(g):
    """Jordan's quintic iteration on one matrix, scaled to the RMS of an AdamW step."""
    is_tall = g.shape[0] > g.shape[1]
    x = g.T if is_tall else g
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if is_tall else x) * 0.2 * math.sqrt(max(g.shape))


def naive_muon(path, g):
    """The first direction: each layer and each expert by itself; heads times head dim are one side of the matrix."""
    if path.endswith(("/q", "/o", "/up", "/down")):
        rows = {"q": SIZES["D"], "o": SIZES["N"] * SIZES["H"], "up": SIZES["D"], "down": SIZES["F"]}
        shape = g.shape
        num = math.prod(shape[: 2 if "experts" in path else 1])
        matrices = g.reshape(num, rows[path.rsplit("/")[-1]], -1)
        return np.stack([newton_schulz(matrix) for matrix in matrices]).reshape(shape)
    return np.sign(g)  # AdamW's first step, but for epsilon


def test_muon_takes_each_layer_and_expert_as_a_matrix_and_leaves_the_rest_to_adamw():
    rate, decay = 0.1, 0.3
    params, gradient = draw(0), draw(1)
    wanted = {}
    for path, p in tree.flatten(params).items():
        direction = naive_muon(path, np.float64(tree.flatten(gradient)[path]))
        wanted[path] = p - rate * (direction + (decay * p if path in DECAYED else 0))
    got = train(make("muon", weight_decay=decay, clip_norm=None, beta1=0.0), params, [gradient])
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_weight_decay_spares_norms_biases_and_routers(name):
    """With no gradient at all a step is the decay alone."""
    params = draw(0)
    got = train(make(name, weight_decay=0.5), params, [jax.tree.map(jnp.zeros_like, params)])
    wanted = {
        path: p * (0.95 if path in DECAYED else 1) for path, p in tree.flatten(params).items()
    }
    assert_close(got, wanted, rtol=1e-6)


def test_clipping_scales_all_gradients_by_the_global_norm():
    params, gradient = draw(0), draw(1)
    norm = optax.tree.norm(gradient)
    small = jax.tree.map(lambda g: g / norm, gradient)
    settings = dict(
        weight_decay=0.0, epsilon=1.0
    )  # a large epsilon lets AdamW see the gradient's size
    clipped = train(make("adamw", clip_norm=1.0, **settings), params, [gradient])
    assert_close(
        clipped,
        tree.flatten(train(make("adamw", clip_norm=None, **settings), params, [small])),
        rtol=1e-5,
    )
    kept = train(make("adamw", clip_norm=2.0, **settings), params, [small])
    assert_close(
        kept,
        tree.flatten(train(make("adamw", clip_norm=None, **settings), params, [small])),
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_frozen_parameters_have_no_state(name):
    params = tree.select(draw(0), ".*attention/q")
    state = make(name).init(params)
    shape = params["layers"]["0"]["attention"]["q"].shape
    assert {leaf.shape for leaf in jax.tree.leaves(state)} <= {shape, (), (3,)}
    assert jax.tree.leaves(train(make(name), params, [params]))[0].shape == shape
