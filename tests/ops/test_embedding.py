"""Rows of a table, and their gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.ops.embedding import look_up


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_and_their_gradient_are_those_of_float64(dtype):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(8, 4)), dtype)
    index = jnp.asarray(rng.integers(0, 7, (3, 50)))  # the last row is never looked up
    cotangent = jnp.asarray(rng.normal(size=(3, 50, 4)), dtype)
    rows, pull = jax.vjp(jax.jit(lambda table: look_up(table, index)), table)
    np.testing.assert_array_equal(rows, np.asarray(table)[index])
    wanted = np.zeros(table.shape)
    np.add.at(wanted, index, np.asarray(cotangent, np.float64))
    (got,) = pull(cotangent)
    assert got.dtype == dtype
    # Rounded once: half a unit in the last place, and what float32 sums are off by.
    off = jnp.finfo(dtype).eps / 2
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=off, atol=1e-6)


def test_a_frequent_row_gets_its_whole_gradient():
    """A sum in bfloat16 would stop growing at 256."""
    table = jnp.ones((3, 2), "bfloat16")
    index = jnp.zeros(1024, int)
    gradient = jax.grad(lambda table: look_up(table, index).astype("float32").sum())(table)
    np.testing.assert_array_equal(gradient, [[1024, 1024], [0, 0], [0, 0]])
