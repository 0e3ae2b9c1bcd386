"""Rows with settings of their own draw what each would draw alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.serve import drawing, sampling
from jaxscale.serve.grammar import WORD
from jaxscale.serve.requests import Penalties, RequestConfig
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError

V = 50
SETTINGS = [
    SamplingConfig(temperature=0),
    SamplingConfig(seed=7),
    SamplingConfig(temperature=0.5, top_k=5, seed=2**32 - 1),
    SamplingConfig(temperature=2.0, top_p=0.6, seed=3),
    SamplingConfig(min_p=0.2, seed=4),
    SamplingConfig(top_p=0.3, seed=8),
    SamplingConfig(temperature=1.5, top_k=9, top_p=0.8, min_p=0.05, seed=5),
    SamplingConfig(top_p=1e-300, seed=6),
]


def rows_of(settings, index, position):
    fields = {
        "temperature": np.float32,
        "top_k": np.int64,
        "top_p": np.float32,
        "min_p": np.float32,
        "seed": np.uint32,
    }
    arrays = {
        name: np.asarray([getattr(each, name) or 0 for each in settings], kind)
        for name, kind in fields.items()
    }
    arrays["top_p_rest"] = np.asarray([1 - each.top_p for each in settings], np.float32)
    arrays["top_k"] = np.where(arrays["top_k"] == 0, V, arrays["top_k"]).clip(max=V)
    arrays["top_k"] = arrays["top_k"].astype(np.int32)
    own = dict(index=np.asarray(index), position=np.asarray(position))
    return drawing.DrawRows(**arrays, **own)


def test_each_row_draws_what_it_draws_alone():
    kind = drawing.DrawKind.of(RequestConfig(each) for each in SETTINGS)
    assert kind == drawing.DrawKind(has_noise=True, has_filters=True)
    draw = jax.jit(functools.partial(drawing.draw, kind=kind))
    rng = np.random.default_rng(0)
    index, position = np.arange(8), np.arange(8) * 3 + 1
    for _ in range(5):
        logits = jnp.asarray(rng.normal(size=(8, V)) * 2, jnp.float32)
        found = draw(logits, rows_of(SETTINGS, index, position))
        for row, config in enumerate(SETTINGS):
            one = slice(row, row + 1)
            keys = sampling.token_keys(jax.random.key(config.seed), index[one], position[one])
            plain = dataclasses.replace(config, seed=0)
            assert found[row] == sampling.sample(logits[one], keys, plain)[0]
        position = position + 1


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 2)], ids=["greedy", "noise"])
def test_what_a_batch_does_not_need_changes_nothing(rows):
    some = SETTINGS[rows]
    kinds = [drawing.DrawKind.of(RequestConfig(each) for each in of) for of in (some, SETTINGS)]
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(len(some), V)), jnp.float32)
    of_rows = rows_of(some, np.arange(len(some)), np.arange(len(some)))
    less, more = (jax.jit(functools.partial(drawing.draw, kind=kind)) for kind in kinds)
    assert kinds[0] != kinds[1]
    np.testing.assert_array_equal(less(logits, of_rows), more(logits, of_rows))


def test_penalties_are_those_of_their_definitions():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, V)).astype(np.float32)
    is_in_prompt = rng.random((2, V)) < 0.2
    counts = rng.integers(0, 3, (2, V))
    values = dict(repetition=[1.0, 1.3], presence=[0.0, 0.4], frequency=[0.0, -0.2])
    penalties = drawing.PenaltyRows(*(jnp.asarray(each) for each in values.values()))
    found = jax.jit(drawing.penalise)(logits, penalties, is_in_prompt, counts)
    np.testing.assert_array_equal(found[0], logits[0])
    for token in range(V):
        wanted, count = logits[1, token], counts[1, token]
        if is_in_prompt[1, token] or count:
            wanted = wanted / 1.3 if wanted > 0 else wanted * 1.3
        wanted = wanted - 0.4 * (count > 0) + 0.2 * count
        np.testing.assert_allclose(found[1, token], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition", 0.0),
        ("repetition", 1e-300),
        ("repetition", 1e300),
        ("repetition", float("nan")),
        ("presence", 1e300),
        ("frequency", -1e7),
        ("frequency", float("nan")),
    ],
)
def test_penalties_that_leave_no_logits_are_refused(name, value):
    with pytest.raises(InputError, match=f"Penalties.{name}: given"):
        Penalties(**{name: value})


@pytest.mark.parametrize("temperature", [0, sampling.MIN_TEMPERATURE, sampling.MAX_TEMPERATURE])
def test_the_smallest_and_the_largest_settings_draw_what_is_allowed(temperature):
    """NaN anywhere would be drawn as the arg max."""
    logits = np.random.default_rng(4).normal(size=(40, V)).astype(np.float32) * 1e3
    only = np.zeros((40, -(-V // WORD)), np.int32)
    only[:, 0] = 0b101 << 7
    own = [SamplingConfig(temperature=temperature, min_p=1e-300, top_p=1e-300, top_k=10**12)]
    rows = rows_of(own * 40, np.arange(40), np.arange(40))
    for value in (0.01, 100.0):
        each = jnp.full(40, value, jnp.float32)
        penalties = drawing.PenaltyRows(each, each * 0 + 1e6, each * 0 - 1e6)
        changed = drawing.penalise(logits, penalties, logits > 0, (logits < 0) * 100_000)
        changed = drawing.only_allowed(changed, jnp.asarray(only))
        kind = drawing.DrawKind.of([RequestConfig(each) for each in own])
        found = drawing.draw(changed, rows, kind)
        assert set(found.tolist()) <= {7, 9}


def test_log_probabilities_of_the_token_drawn_and_of_the_most_probable():
    logits = np.random.default_rng(2).normal(size=(3, V)).astype(np.float32)
    drawn = np.asarray([4, 9, 0])
    of_drawn, top, tokens = jax.jit(drawing.log_probabilities, static_argnums=2)(logits, drawn, V)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-wanted, -1)[:, : top.shape[1]]
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_allclose(top, np.take_along_axis(wanted, order, -1), rtol=1e-5)
    np.testing.assert_allclose(of_drawn, wanted[np.arange(3), drawn], rtol=1e-5)
