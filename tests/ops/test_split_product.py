"""Products of bfloat16 parts against float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.kernels.parts import parts_of
from jaxscale.ops.split_product import split_product


def test_product_and_gradients_are_those_of_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 256)), jnp.bfloat16)
    w, dy = (
        jnp.asarray(rng.normal(size=s) * 10.0 ** rng.integers(-3, 3, s), jnp.float32)
        for s in ((256, 16), (40, 16))
    )
    y, pullback = jax.jit(lambda x, w: jax.vjp(split_product, x, w))(x, w)
    dx, dw = pullback(dy)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    for got, want, scale, tolerance in (
        (y, x @ w, abs(x) @ abs(w), 1e-6),
        (dw, x.T @ dy, abs(x).T @ abs(dy), 1e-6),
        (dx, dy @ w.T, np.maximum(abs(dy @ w.T), 2.0**-7 * (abs(dy) @ abs(w).T)), 2.0**-8),
    ):
        assert (abs(np.asarray(got, np.float64) - want) <= tolerance * scale).all()


def test_parts_are_the_number_even_when_compiled():
    """A compiler that leaves out the rounding would leave nothing for the later parts."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    high, middle, low = (np.asarray(p, np.float64) for p in jax.jit(lambda x: parts_of(x, 3))(x))
    np.testing.assert_array_equal(high + middle + low, np.asarray(x, np.float64))
    assert np.abs(middle).max() > 1e-4
