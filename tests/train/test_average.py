"""The running average of the parameters, beside its formula."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxscale.train.average import averaging
from jaxscale.train.optim import OptimizerConfig, check_moments
from jaxscale.types import InputError


def test_the_average_is_that_of_the_parameters_after_each_update():
    decay, rng = 0.75, np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=3), jnp.float32), "frozen": None}
    transform = averaging(decay)
    state, wanted = transform.init(params), None
    for number in range(4):
        given = {"a": jnp.asarray(rng.normal(size=3), jnp.float32), "frozen": None}
        updates, state = transform.update(given, state, params)
        np.testing.assert_array_equal(updates["a"], given["a"])
        params = optax.apply_updates(params, updates)
        new = np.float64(params["a"])
        wanted = new if wanted is None else decay * wanted + (1 - decay) * new
        np.testing.assert_allclose(state.average["a"], wanted, rtol=1e-6)
        assert state.count == number + 1
    assert state.average["frozen"] is None


def test_a_bias_that_forbids_a_word_goes_on_forbidding_it():
    params = {"a": jnp.array([1.0, -jnp.inf])}
    transform = averaging(0.9)
    state = transform.init(params)
    for _ in range(2):
        _, state = transform.update({"a": jnp.zeros(2)}, state, params)
    np.testing.assert_allclose(state.average["a"], [1, -np.inf])


@pytest.mark.parametrize("use_8bit_moments", [False, True])
def test_an_average_that_would_stand_still_is_refused(use_8bit_moments):
    fields = dict(use_8bit_moments=use_8bit_moments)
    check_moments(OptimizerConfig(average_decay=0.99, **fields), "bfloat16")
    check_moments(OptimizerConfig(average_decay=0.999, **fields), "float32")
    message = r"OptimizerConfig\.average_decay: given 0\.999, expected 1 - average_decay >= 0\.0078"
    with pytest.raises(InputError, match=message):
        check_moments(OptimizerConfig(average_decay=0.999, **fields), "bfloat16")


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_out_of_its_bounds_is_refused(decay):
    with pytest.raises(InputError, match=r"average_decay: given .*, expected 0 < decay < 1"):
        OptimizerConfig(average_decay=decay)
