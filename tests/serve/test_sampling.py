"""Filters against a numpy implementation of the definitions, and draws against probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.serve.sampling import SamplingConfig, filter_logits, sample, token_keys
from jaxscale.types import InputError

CONFIGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.5),
    SamplingConfig(top_k=1),
    SamplingConfig(top_k=5),
    SamplingConfig(top_k=1000),
    SamplingConfig(top_p=0.7),
    SamplingConfig(top_p=1e-9),
    SamplingConfig(top_p=1e-300),
    SamplingConfig(min_p=0.2),
    SamplingConfig(min_p=1.0),
    SamplingConfig(temperature=2.0, top_k=7, top_p=0.8, min_p=0.3),
]


def naive_distribution(logits, config):
    """Probabilities of one row, by loops over the tokens in descending order."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / config.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if config.top_k is not None:
        p[order[config.top_k :]] = 0
        p /= p.sum()
    total, kept = 0.0, np.zeros(len(p), bool)
    for i in order:
        if total >= config.top_p:
            break
        kept[i], total = True, total + p[i]
    p = np.where(kept, p, 0)
    p /= p.sum()
    p[p < config.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_distribution_is_the_definitions(config):
    logits = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * 2
    got = jax.nn.softmax(filter_logits(jnp.asarray(logits), config))
    for row, wanted in zip(got, (naive_distribution(row, config) for row in logits), strict=True):
        np.testing.assert_array_equal(row > 0, wanted > 0)
        np.testing.assert_allclose(row, wanted, rtol=1e-5)


@pytest.mark.parametrize("p", [1e-5, 0.3, 0.9, 0.9999, 0.999999])
def test_a_large_vocabulary_is_cut_where_float64_cuts_it(p):
    """A float32 sum of 150,000 probabilities is off by more than the last of them hold."""
    logits = np.random.default_rng(0).normal(size=(1, 150_000)).astype(np.float32) * 3
    got = np.isfinite(filter_logits(jnp.asarray(logits), SamplingConfig(top_p=p))).sum()
    exact = np.exp(logits.astype(np.float64) - logits.max())
    descending = -np.sort(-exact[0] / exact.sum())
    assert got == (np.cumsum(descending) - descending < p).sum()


def test_of_equal_tokens_the_lowest_stay():
    logits = jnp.tile(jnp.asarray([[0.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]]), (25, 1))

    def support(**settings):
        kept = filter_logits(logits, SamplingConfig(**settings)) > -jnp.inf
        return [[i for i, is_kept in enumerate(row) if is_kept] for row in kept[:2].tolist()]

    assert support(top_k=2) == [[1, 2], [0, 1]]
    assert support(top_p=0.3) == [[1, 2], [0, 1]]
    assert support(top_p=1e-9) == [[1], [0]]
    assert support(min_p=1.0) == [[1, 2, 3], [0, 1, 2, 3]]
    keys = jax.random.split(jax.random.key(0), len(logits))
    assert sample(logits, keys, SamplingConfig(temperature=0)).tolist() == [1, 0] * 25


def test_extreme_logits_keep_the_arg_max():
    logits = jnp.tile(jnp.asarray([[-1e30, 1e30, 0.0, -jnp.inf]]), (50, 1))
    keys = jax.random.split(jax.random.key(0), 50)
    for config in [*CONFIGS, SamplingConfig(temperature=1e-6)]:
        assert set(sample(logits, keys, config).tolist()) == {1}


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=["plain", "filtered"])
def test_frequencies_are_the_probabilities(config):
    logits, count = np.random.default_rng(1).normal(size=12).astype(np.float32), 20_000
    keys = token_keys(jax.random.key(3), jnp.arange(count), jnp.arange(count) % 17)
    tokens = jax.jit(lambda: sample(jnp.tile(logits, (count, 1)), keys, config))()
    wanted = naive_distribution(logits, config)
    frequencies = np.bincount(tokens, minlength=12) / count
    assert np.all(np.abs(frequencies - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / count))


def test_a_key_depends_on_seed_sequence_and_position_only():
    def words(seed, sequences, positions):
        keys = token_keys(jax.random.key(seed), jnp.asarray(sequences), jnp.asarray(positions))
        return jax.random.key_data(keys).tolist()

    base = words(0, [4, 5, 7], [7, 8, 4])
    assert words(0, [9, 5, 4], [9, 8, 7])[1:] == base[1::-1]
    assert base[0] not in words(1, [4, 5, 7], [7, 8, 4])
    assert base[0] != base[2]  # sequence and position are not exchanged


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-30),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e30),
        ("top_k", 0),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(InputError, match=f"SamplingConfig.{name}: given"):
        SamplingConfig(**{name: value})
