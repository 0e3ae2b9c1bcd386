"""Schedules at their edges, each optimizer against a naive one, and what it reads of roles."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxscale import tree
from jaxscale.models.parameters import Parameter
from jaxscale.train.optim import OptimizerConfig, check_moments, learning_rates, make_optimizer
from jaxscale.types import InputError, Role

PEAK = 0.5
SIZES = dict(V=7, D=6, N=2, H=4, E=3, F=5, L=2)


def entry(dims, role, **more):
    return Parameter(dims, tuple(SIZES[letter] for letter in dims), role, **more)


TABLE = {
    "embedding": {"tokens": entry("VD", Role.EMBEDDING)},
    "layers": {
        "0": {
            "attention": {
                "q": entry("LDNH", Role.MATRIX),
                "o": entry("LNHD", Role.MATRIX),
                "q_bias": entry("LNH", Role.BIAS),
                "norm": {"scale": entry("LD", Role.NORM)},
            },
            "moe": {
                "router": entry("LDE", Role.ROUTER),
                "experts": {
                    "up": entry("LEDF", Role.EXPERT),
                    "down": entry("LEFD", Role.EXPERT),
                },
            },
        }
    },
}
DECAYED = {
    "embedding/tokens",
    "layers/0/attention/q",
    "layers/0/attention/o",
    "layers/0/moe/experts/up",
    "layers/0/moe/experts/down",
}


def make_schedule_of(steps, **fields):
    return learning_rates(OptimizerConfig(learning_rate=PEAK, **fields), steps)


@pytest.mark.parametrize(
    ("dtype", "beta2", "is_refused"),
    [
        ("bfloat16", 0.999, True),
        ("bfloat16", 0.99, False),
        ("bfloat16", 0.95, False),
        ("float32", 0.999, False),
    ],
)
def test_a_second_moment_follows_its_gradients_or_is_refused(dtype, beta2, is_refused):
    """A gradient of 1, then 3,000 of 1e-3: the exact moment ends near 1e-6."""
    config = OptimizerConfig(beta2=beta2)
    if is_refused:
        message = r"OptimizerConfig\.beta2: given 0\.999, expected 1 - beta2 >= 0\.00781"
        with pytest.raises(InputError, match=message):
            check_moments(config, dtype)
        return
    check_moments(config, dtype)
    transform = optax.scale_by_adam(b1=0.9, b2=beta2)

    def step(state, gradient):
        return transform.update(gradient, state)[1], None

    gradients = jnp.asarray([1.0] + [1e-3] * 3000, dtype)
    state, _ = jax.lax.scan(step, transform.init(jnp.zeros((), dtype)), gradients)
    exact = (1 - beta2) * sum(
        float(g) ** 2 * beta2**i for i, g in enumerate(gradients.astype(float)[::-1])
    )
    assert float(state.nu) == pytest.approx(exact, rel=0.5 if dtype == "bfloat16" else 1e-3)


def draw(seed):
    """A tree of normal numbers in the shape of TABLE."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda entry: jnp.float32(rng.normal(size=entry.shape)), TABLE)


def make(name, table=TABLE, **fields):
    constant = dict(learning_rate=0.1, schedule="wsd", decay_fraction=0.0)
    return make_optimizer(OptimizerConfig(name, **constant | fields), steps=10, table=table)


def train(optimizer, params, gradients):
    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
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
    # In the middle between the last step of the warm-up and the last of all.
    half = 10 + (99 - 9) // 2 - 1
    for schedule in ("cosine", "linear"):
        rate = make_schedule_of(100, schedule=schedule, warmup_steps=10)
        assert rate(half) == pytest.approx(PEAK * 0.55)
    quarter = 9 + (half - 9) / 2
    cosine = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    rate = make_schedule_of(100, schedule="cosine", warmup_steps=10)
    assert rate(quarter) == pytest.approx(PEAK * cosine)
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
        dict(decayed=("matrix", "lora")),
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
    message = r"OptimizerConfig.decayed: given \('logit_bias',\), expected some of .*, matrix, norm"
    with pytest.raises(InputError, match=message):
        make("adamw", decayed=("logit_bias",), weight_decay=0.1)
    make("adamw", decayed=("logit_bias",), weight_decay=0.0)


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
    """The first direction of a matrix, which heads times head dim are one side of."""
    if path.endswith(("/q", "/o", "/up", "/down")):
        rows = {"q": SIZES["D"], "o": SIZES["N"] * SIZES["H"], "up": SIZES["D"], "down": SIZES["F"]}
        shape = g.shape
        # Each layer and each expert is a matrix by itself.
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


def with_role(path, role):
    """TABLE with another role for one parameter."""

    def change(each, entry):
        return dataclasses.replace(entry, role=role) if each == path else entry

    return tree.map_with_path(change, TABLE)


@pytest.mark.parametrize(
    ("path", "role", "is_decayed"),
    [
        ("layers/0/attention/q", Role.BIAS, False),
        ("embedding/tokens", Role.POSITIONS, False),
        ("layers/0/moe/experts/up", Role.ROUTER, False),
        ("layers/0/attention/norm/scale", Role.MATRIX, True),
        ("layers/0/attention/q_bias", Role.UNEMBEDDING, True),
        ("layers/0/moe/router", Role.EXPERT, True),
    ],
)
def test_weight_decay_reads_the_role_and_no_name(path, role, is_decayed):
    params = draw(0)
    optimizer = make("adamw", with_role(path, role), weight_decay=0.5)
    got = train(optimizer, params, [jax.tree.map(jnp.zeros_like, params)])
    decayed = DECAYED | {path} if is_decayed else DECAYED - {path}
    wanted = {}
    for each, leaf in tree.flatten(params).items():
        wanted[each] = leaf * (0.95 if each in decayed else 1)
    assert_close(got, wanted, rtol=1e-6)


def test_the_decayed_roles_are_those_of_the_configuration():
    params = draw(0)
    optimizer = make("adamw", weight_decay=0.5, decayed=("norm", "router"))
    got = train(optimizer, params, [jax.tree.map(jnp.zeros_like, params)])
    wanted = {}
    for path, leaf in tree.flatten(params).items():
        wanted[path] = leaf * (0.95 if path.endswith(("scale", "router")) else 1)
    assert_close(got, wanted, rtol=1e-6)


def test_muon_reads_the_role_and_no_name():
    """A matrix called `embedding` is one, and what is called `q` but is none goes to AdamW."""
    table = with_role("embedding/tokens", Role.MATRIX)
    table["layers"]["0"]["attention"]["q"] = entry("LDNH", Role.POSITIONS)
    params, gradient = draw(0), draw(1)
    optimizer = make("muon", table, weight_decay=0.0, clip_norm=None, beta1=0.0)
    got = tree.flatten(train(optimizer, params, [gradient]))
    gradient = {path: np.float64(leaf) for path, leaf in tree.flatten(gradient).items()}

    def direction(path):
        """The step over the rate, in float64."""
        before = np.float64(tree.flatten(params)[path])
        return (before - np.float64(got[path])) / 0.1

    matrix, q = "embedding/tokens", "layers/0/attention/q"
    wanted = newton_schulz(gradient[matrix])
    np.testing.assert_allclose(direction(matrix), wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(direction(q), np.sign(gradient[q]), rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_a_learning_rate_factor_multiplies_the_whole_update(name):
    """Decay included, and only of the parameter that has it."""
    path = "layers/0/attention/o"
    table = tree.map_with_path(
        lambda each, entry: (
            dataclasses.replace(entry, learning_rate_factor=0.25) if each == path else entry
        ),
        TABLE,
    )
    params, gradients = draw(0), [draw(1)]
    plain = tree.flatten(train(make(name), params, gradients))
    got = tree.flatten(train(make(name, table), params, gradients))
    for each, before in tree.flatten(params).items():
        factor = 0.25 if each == path else 1.0
        wanted = before + factor * (plain[each] - before)
        np.testing.assert_allclose(got[each], wanted, rtol=1e-5, atol=1e-6, err_msg=each)


def test_all_updates_of_a_step_have_its_learning_rate():
    config = OptimizerConfig("lion", PEAK, warmup_steps=2, weight_decay=0.0)
    optimizer = make_optimizer(config, steps=5, num_epochs=3, table=TABLE)
    params = tree.select(draw(0), ".*moe/router")
    state, rates = optimizer.init(params), []
    for _ in range(15):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        rates.append(-jax.tree.leaves(updates)[0].mean())
    wanted = [learning_rates(config, 5)(step) for step in range(5)]
    assert len(set(map(float, wanted))) > 3
    np.testing.assert_allclose(rates, np.repeat(wanted, 3), rtol=1e-6)


def test_clipping_scales_all_gradients_by_the_global_norm():
    params, gradient = draw(0), draw(1)
    norm = optax.tree.norm(gradient)
    small = jax.tree.map(lambda g: g / norm, gradient)

    def step(clip_norm, gradient):
        # A large epsilon lets AdamW see the gradient's size.
        optimizer = make("adamw", clip_norm=clip_norm, weight_decay=0.0, epsilon=1.0)
        return train(optimizer, params, [gradient])

    unclipped = tree.flatten(step(None, small))
    assert_close(step(1.0, gradient), unclipped, rtol=1e-5)
    assert_close(step(2.0, small), unclipped, rtol=1e-6)


def test_each_model_of_a_run_is_clipped_by_its_own_norm():
    path = "layers/0/attention/o"
    table = tree.map_with_path(
        lambda each, entry: dataclasses.replace(entry, model="other") if each == path else entry,
        TABLE,
    )
    # The other model's gradient is 1000 times as large, and so would the common norm be.
    gradient = tree.map_with_path(lambda each, g: 1000 * g if each == path else g, draw(1))
    others = tree.select(draw(1), f"(?!{path}).*")
    own_norm = optax.tree.norm(tree.flatten(gradient)[path])
    clipped = tree.map_with_path(
        lambda each, g: g / (own_norm if each == path else optax.tree.norm(others)), gradient
    )
    settings = dict(weight_decay=0.0, epsilon=1.0)
    found = train(make("adamw", table, **settings), draw(0), [gradient])
    wanted = train(make("adamw", clip_norm=None, **settings), draw(0), [clipped])
    assert_close(found, tree.flatten(wanted), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_frozen_parameters_have_no_state(name):
    params = tree.select(draw(0), ".*attention/q")
    state = make(name).init(params)
    shape = params["layers"]["0"]["attention"]["q"].shape
    assert {leaf.shape for leaf in jax.tree.leaves(state)} <= {shape, (), (3,)}
    assert jax.tree.leaves(train(make(name), params, [params]))[0].shape == shape
