"""The running average of the parameters, beside its formula."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxscale.train.average import averaging
from jaxscale.train.optim import OptimizerConfig
from jaxscale.types import InputError


def test_the_average_is_that_of_the_parameters_after_each_update():
    decay, rng = 0.75, np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=3), jnp.float32), "frozen": None}
    transform = averaging(decay, {"a", "frozen"})
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


def test_what_is_not_named_has_no_average():
    params = {"a": jnp.ones(1), "critic": jnp.ones(1)}
    transform = averaging(0.5, {"a"})
    _, state = transform.update(params, transform.init(params), params)
    assert state.average["critic"] is None and state.average["a"] == 2


def test_a_bias_that_forbids_a_word_goes_on_forbidding_it():
    params = {"a": jnp.array([1.0, -jnp.inf])}
    transform = averaging(0.9, {"a"})
    state = transform.init(params)
    for _ in range(2):
        _, state = transform.update({"a": jnp.zeros(2)}, state, params)
    np.testing.assert_allclose(state.average["a"], [1, -np.inf])


def test_the_average_of_bfloat16_follows_small_changes():
    params = {"a": jnp.ones(1, jnp.bfloat16)}
    transform = averaging(0.99, {"a"})
    state = transform.init(params)
    none = {"a": jnp.zeros(1, jnp.bfloat16)}
    _, state = transform.update(none, state, params)
    for _ in range(300):
        _, state = transform.update(none, state, {"a": jnp.full(1, 1.0234375, jnp.bfloat16)})
    np.testing.assert_allclose(state.average["a"], 1.0234375 - 0.0234375 * 0.99**300, rtol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_out_of_its_bounds_is_refused(decay):
    with pytest.raises(InputError, match=r"average_decay: given .*, expected 0 < decay < 1"):
        OptimizerConfig(average_decay=decay)
