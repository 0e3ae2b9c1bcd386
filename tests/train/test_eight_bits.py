"""Moments in 8 bits follow their gradients, train as well, and rest where their parameters do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.parallel.mesh import MeshConfig
from jaxscale.train.eight_bits import EIGHT_BITS, decode, encode
from tests.train.examples import OPTIMIZER, make_regression
from tests.train.regression import make_rows

IN_8_BITS = dataclasses.replace(OPTIMIZER, use_8bit_moments=True)


@pytest.mark.parametrize("is_root", [False, True])
def test_what_is_stored_is_right_on_average_and_never_far_off(is_root):
    """A number has 3 bits after its first; a square is twice as far off as its root."""
    draw = np.random.default_rng(0)
    moment = jnp.asarray(draw.normal(size=(3, 64)) * [[1e-9], [1], [1e5]], jnp.float32)
    moment = moment**2 if is_root else moment
    keys = jax.random.split(jax.random.key(0), 512)

    def there_and_back(key):
        values, scale = encode(moment, key, is_root=is_root)
        assert values.dtype == EIGHT_BITS and scale.shape == (3, 1)
        return decode(values, scale, is_root=is_root)

    found = jax.jit(jax.vmap(there_and_back))(keys)
    largest = jnp.abs(moment).max(-1, keepdims=True)
    error = jnp.abs(found - moment) / jnp.maximum(jnp.abs(moment), largest / 448 / 4)
    assert error.max() < (0.3 if is_root else 0.13)
    root = jnp.sqrt if is_root else jnp.asarray
    bias = jnp.abs(root(found).mean(0) - root(moment)) / root(largest)
    assert bias.max() < 8e-3  # a chance of 4 standard deviations


def test_a_row_of_zeros_stays_one_and_no_second_moment_becomes_zero():
    @functools.partial(jax.jit, static_argnums=1)
    def there_and_back(moment, is_root):
        return decode(*encode(moment, jax.random.key(0), is_root=is_root), is_root=is_root)

    assert not np.asarray(there_and_back(np.zeros((2, 4), np.float32), False)).any()
    found = np.asarray(there_and_back(np.array([[1.0, 1e-30, 0.0]], np.float32), True))[0]
    assert found[1] > 0 and found[2] == 0


def test_training_goes_on_as_with_whole_moments():
    mesh, losses = MeshConfig(data=2, zero=1), {}
    for optimizer in (OPTIMIZER, IN_8_BITS):
        training, state = make_regression(mesh, optimizer), None
        for _ in range(10):
            state, metrics = training.run(make_rows(0), state=state)
            losses.setdefault(optimizer, []).append(float(metrics["loss"]))
    wanted, found = losses.values()
    assert found[-1] < found[0]
    np.testing.assert_allclose(found, wanted, rtol=0.02)
    leaves = jax.tree.leaves(state.opt_state)
    moments = [leaf for leaf in leaves if leaf.dtype == EIGHT_BITS]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    assert any(not leaf.sharding.is_fully_replicated for leaf in moments)
