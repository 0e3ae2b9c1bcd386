"""Rotary positions against complex rotation, and what they are made for: only distances matter.

The scalings' frequencies against the papers' formulas; tests/models/test_huggingface.py compares
them with those of Hugging Face.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.ops.rotary import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RotaryConfig,
    YarnScaling,
    document_lengths,
    rotate,
)
from jaxscale.types import InputError

X = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype("float32")
POSITIONS = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]])
PLAIN = RotaryConfig(theta=1e4)
run = jax.jit(rotate, static_argnums=2)


def turned(x, positions, frequencies, magnitude=1.0):
    """Pairs as complex numbers, multiplied by e^(i position frequency), in float64."""
    half = len(frequencies)
    z = x[..., :half] + 1j * x[..., half : 2 * half]
    z = z * magnitude * np.exp(1j * positions[..., None, None] * frequencies)
    return np.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)


def plain_frequencies(size, theta):
    return theta ** (-2 * np.arange(size // 2) / size)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 3e-2)])
def test_equals_complex_rotation(theta, dtype, tolerance):
    y = run(jnp.asarray(X, dtype), POSITIONS, RotaryConfig(theta))
    assert y.dtype == dtype
    wanted = turned(X, POSITIONS, plain_frequencies(8, theta))
    np.testing.assert_allclose(y.astype("float32"), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("fraction, size", [(0.5, 4), (0.75, 6), (0.8, 6)])
def test_a_fraction_rotates_the_first_elements_of_a_head(fraction, size):
    """With the frequencies of a head of that size; the others pass."""
    y = run(jnp.asarray(X), POSITIONS, RotaryConfig(1e4, fraction=fraction))
    wanted = turned(X, POSITIONS, plain_frequencies(size, 1e4))
    np.testing.assert_allclose(y, wanted, atol=2e-6, rtol=2e-6)
    np.testing.assert_array_equal(y[..., size:], X[..., size:])


def test_scores_depend_on_the_distance_alone():
    @jax.jit
    def scores(shift):
        q, k = (rotate(x, POSITIONS + shift, PLAIN) for x in (X[:, :, :1], X[:, :, 1:2]))
        return jnp.einsum("btnh,bsnh->bts", q, k)

    np.testing.assert_allclose(scores(0), scores(1000), atol=2e-3)


def test_the_gradient_pads_nothing():
    """Two halves joined would have the gradient of two padded halves and their sum."""

    def total(x):
        return rotate(x, POSITIONS, PLAIN).sum()

    gradient = jax.make_jaxpr(jax.grad(total))(jnp.asarray(X))
    assert "pad" not in {eqn.primitive.name for eqn in gradient.jaxpr.eqns}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_positions_keep_their_angles(dtype):
    """At position 131,000 an angle of float32 is good to 2^-8 of a radian, whatever x's type.

    bfloat16 angles would be off by hundreds of turns.
    """
    x = np.ones((1, 1, 1, 128))
    position = np.array([[131_000]])
    y = run(jnp.asarray(x, dtype), position, RotaryConfig(5e5)).astype("float32")
    wanted = turned(x, position, plain_frequencies(128, 5e5))
    np.testing.assert_allclose(y, wanted, atol=2**-7 if dtype == "float32" else 2**-6)


# Scalings


def test_linear_scaling_divides_every_frequency():
    got = RotaryConfig(1e4, scaling=LinearScaling(4.0)).frequencies(64)
    np.testing.assert_allclose(got, plain_frequencies(64, 1e4) / 4, rtol=1e-14)


def test_longrope_divides_each_frequency_by_its_own_factor():
    factors = tuple(1.0 + i for i in range(8))
    config = RotaryConfig(1e4, scaling=LongRopeScaling(factors, magnitude=1.2))
    wanted = plain_frequencies(16, 1e4) / np.array(factors)
    np.testing.assert_allclose(config.frequencies(16), wanted, rtol=1e-14)
    x = np.tile(X, 2)
    y = run(jnp.asarray(x), POSITIONS, config)
    np.testing.assert_allclose(y, turned(x, POSITIONS, wanted, 1.2), atol=4e-6)


def test_llama3_scaling_goes_by_the_wavelength():
    """Pair by pair, as Llama's released code has it."""
    factor, low, high, length = 8.0, 1.0, 4.0, 8192
    wanted = []
    for frequency in plain_frequencies(128, 5e5):
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            wanted.append(frequency)
        elif wavelength > length / low:
            wanted.append(frequency / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            wanted.append((1 - smooth) * frequency / factor + smooth * frequency)
    scaling = Llama3Scaling(factor, low, high, length)
    got = RotaryConfig(5e5, scaling=scaling).frequencies(128)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    assert len({*np.round(np.array(wanted) / plain_frequencies(128, 5e5), 6)}) > 5


@pytest.mark.parametrize(
    ("theta", "length", "size"),
    [
        (1e4, 4096, 128),
        (1e6, 32768, 128),
        # The ramp would begin before the first pair, or end behind all elements of the head.
        (10.0, 64, 16),
        (10.0, 2000, 16),
    ],
)
def test_yarn_interpolates_by_the_number_of_rotations(theta, length, size):
    """The paper's ramp over pairs, whose ends are rounded outwards as in its released code."""
    factor = 16.0
    config = RotaryConfig(theta, scaling=YarnScaling(factor, length))

    def pair_of(num_rotations):
        return size * math.log(length / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(32)), 0)
    high = min(math.ceil(pair_of(1)), size - 1)
    plain, wanted = plain_frequencies(size, theta), []
    for pair, frequency in enumerate(plain):
        share = min(max((pair - low) / (high - low), 0), 1)
        wanted.append(share * frequency / factor + (1 - share) * frequency)
    np.testing.assert_allclose(config.frequencies(size), wanted, rtol=1e-12)
    assert config.frequencies(size)[0] == plain[0]
    assert (config.frequencies(size)[-1] == plain[-1] / factor) == (high < size // 2)


def test_yarn_s_magnitude_of_no_longer_text_is_1():
    assert YarnScaling(0.5, 64).magnitude == YarnScaling(1.0, 64).magnitude == 1


def test_rows_without_segments_have_lengths_of_their_own():
    positions = jnp.asarray([[0, 1, 2, 3], [0, 1, 1, 1]])
    got = document_lengths(positions, None, lambda x: x)
    np.testing.assert_array_equal(got, [[4] * 4, [2] * 4])


def test_yarn_s_magnitude_is_on_queries_and_keys():
    """0.1 ln(s) + 1 unless it is given, so that their product has its square."""
    for given, magnitude in ((None, 0.1 * math.log(4) + 1), (0.7, 0.7)):
        config = RotaryConfig(1e4, scaling=YarnScaling(4.0, 64, attention_factor=given))
        y = run(jnp.asarray(X), POSITIONS, config)
        wanted = turned(X, POSITIONS, config.frequencies(8), magnitude)
        np.testing.assert_allclose(y, wanted, atol=4e-6)


LLAMA3 = dict(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64)
YARN = dict(factor=4.0, original_length=64)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (RotaryConfig, dict(theta=0.0), "RotaryConfig.theta: given 0.0"),
        (RotaryConfig, dict(fraction=0.0), "RotaryConfig.fraction: given 0.0, expected 0 < frac"),
        (RotaryConfig, dict(fraction=1.5), "RotaryConfig.fraction: given 1.5"),
        (RotaryConfig, dict(scaling=4.0), "RotaryConfig.scaling: given 4.0"),
        (LinearScaling, dict(factor=0.0), "LinearScaling.factor: given 0.0"),
        *((Llama3Scaling, LLAMA3 | {name: 0}, f"Llama3Scaling.{name}: given 0") for name in LLAMA3),
        (
            Llama3Scaling,
            LLAMA3 | dict(high_frequency_factor=1.0),
            "Llama3Scaling.high_frequency_factor: given 1.0, expected above low_frequency_factor",
        ),
        (YarnScaling, YARN | dict(factor=-1.0), "YarnScaling.factor: given -1.0"),
        (YarnScaling, YARN | dict(original_length=0), "YarnScaling.original_length: given 0"),
        (YarnScaling, YARN | dict(beta_slow=0.0), "YarnScaling.beta_slow: given 0.0"),
        (YarnScaling, YARN | dict(beta_fast=1.0), "YarnScaling.beta_fast: given 1.0, expected abo"),
        (YarnScaling, YARN | dict(attention_factor=0.0), "YarnScaling.attention_factor: given 0"),
        (LongRopeScaling, dict(factors=(1.0, 0.0)), "LongRopeScaling.factors: given 0.0"),
        (LongRopeScaling, dict(factors=(), magnitude=0.0), "LongRopeScaling.magnitude: given 0.0"),
        (RotaryConfig, dict(theta=1.0), "RotaryConfig.theta: given 1.0, expected above 1"),
        (RotaryConfig, dict(theta=math.nan), "RotaryConfig.theta: given nan"),
    ],
)
def test_a_wrong_setting_is_named(kind, fields, message):
    with pytest.raises(InputError) as error:
        kind(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "head_dim", "message"),
    [
        (PLAIN, 7, "AttentionConfig.head_dim: given 7, expected an even number"),
        (RotaryConfig(fraction=0.1), 8, "int(head_dim * fraction) = 0 first elements"),
        (RotaryConfig(fraction=0.4), 8, "int(head_dim * fraction) = 3 first elements"),
        (
            RotaryConfig(scaling=LongRopeScaling((1.0, 2.0))),
            8,
            "LongRopeScaling.factors: given '2 factors', expected 4, one for each pair",
        ),
    ],
)
def test_a_head_that_makes_no_pairs_is_refused(config, head_dim, message):
    with pytest.raises(InputError) as error:
        config.check_head_dim(head_dim)
    assert message in str(error.value)
