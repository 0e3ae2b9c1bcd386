"""Weights with low-rank adapters: the formula for every form of matrix, and small ones count."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.ops.linear import Adapted, linear, linear_heads, map_outputs

# The equations of a layer's matrices, the dims of x, of the inputs and of the outputs.
SIZES = dict(b=2, t=3, d=8, f=6, n=4, h=5)
EQUATIONS = {"btd,df->btf": ("d", "f"), "btf,fd->btd": ("f", "d"), "btnh,nhd->btd": ("nh", "d")}


def draw(random, dims, **more):
    sizes = SIZES | more
    return random.normal(size=[sizes[dim] for dim in dims])


@pytest.mark.parametrize("equation", EQUATIONS)
def test_an_adapter_adds_its_product(equation):
    random = np.random.default_rng(0)
    inputs, outputs = EQUATIONS[equation]
    x, matrix = (draw(random, dims) for dims in equation.split("->")[0].split(","))
    a, b = draw(random, inputs + "r", r=2), draw(random, "r" + outputs, r=2)
    got = linear(equation, jnp.asarray(x), Adapted(*map(jnp.asarray, (matrix, a, b)), 0.5))
    whole = matrix + 0.5 * np.tensordot(a, b, 1)
    np.testing.assert_allclose(got, np.einsum(equation, x, whole), rtol=2e-5, atol=1e-5)


def test_heads_with_and_without_adapters_in_one_product():
    random = np.random.default_rng(1)
    x = draw(random, "btd")
    plain, matrix = draw(random, "dnh"), draw(random, "dnh", n=2)
    a, b = draw(random, "dr", r=2), draw(random, "rnh", n=2, r=2)
    adapted = Adapted(*map(jnp.asarray, (matrix, a, b)), 2.0)
    first, second = linear_heads(jnp.asarray(x), [jnp.asarray(plain), adapted])
    np.testing.assert_allclose(first, np.einsum("btd,dnh->btnh", x, plain), rtol=2e-5, atol=1e-5)
    whole = matrix + 2.0 * np.tensordot(a, b, 1)
    np.testing.assert_allclose(second, np.einsum("btd,dnh->btnh", x, whole), rtol=2e-5, atol=2e-5)
    (head,) = linear_heads(jnp.asarray(x), [map_outputs(lambda w: w[:, 1:], adapted)])
    np.testing.assert_allclose(head, second[:, :, 1:], rtol=1e-6)


def test_in_bfloat16_an_adapter_far_below_its_matrix_counts():
    signs = jnp.where(jnp.arange(1024) % 2, 1.0, -1.0)[:, None]  # whose sum is 0
    a, b = jnp.full((1024, 1), 1e-3), jnp.ones((1, 1))
    matrix, a, b = (array.astype("bfloat16") for array in (signs, a, b))
    x = jnp.ones((1, 1, 1024), "bfloat16")
    y = linear("btd,df->btf", x, Adapted(matrix, a, b, 1.0))
    np.testing.assert_allclose(y.astype("float32"), 1.024, rtol=0.01)
