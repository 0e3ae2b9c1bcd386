"""Operations whose bits depend on a token alone: their values, and the gradients of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.rms_norm import reference
from jaxscale.ops import by_row, linear, norm
from jaxscale.ops.by_row import ByRow

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("width", [1, 63, 64, 130, 5000])
def test_a_total_is_the_sum(width):
    x = RNG.normal(size=(3, width))
    found = jax.jit(by_row.total)(jnp.asarray(x, "float32"))
    np.testing.assert_allclose(found, x.sum(-1), rtol=1e-5, atol=1e-5)


def test_the_norm_is_the_reference_with_its_gradients():
    x, scale = (jnp.asarray(RNG.normal(size=s), "float32") for s in ((5, 2, 96), (96,)))

    def both(f):
        def run(x, scale):
            y, pullback = jax.vjp(f, x, scale)
            return y, *pullback(jnp.cos(y))

        return jax.jit(run)(x, scale)

    found = both(lambda x, scale: norm.rms_norm(x, ByRow(scale), epsilon=1e-5))
    wanted = both(lambda x, scale: reference.rms_norm(x, scale, 1e-5))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    of_residual, alone = (
        jax.jit(lambda x, scale, f=f: f(x, ByRow(scale), epsilon=1e-5))(x, scale)
        for f in (norm.residual_norm, norm.rms_norm)
    )
    jax.tree.map(np.testing.assert_array_equal, of_residual, (x, alone))


def test_products_go_to_the_kernel_as_matrices(monkeypatch):
    """One input or two, joined or not: values and gradients are those of plain weights."""
    monkeypatch.setattr(by_row.kernel, "matmul", lambda rows, matrix: rows @ matrix)
    h, o = (jnp.asarray(RNG.normal(size=s), "float32") for s in ((2, 3, 8), (2, 3, 4, 2)))
    q, k, out = (
        jnp.asarray(RNG.normal(size=s), "float32") for s in ((8, 4, 2), (8, 1, 2), (4, 2, 8))
    )

    def value(wrap, q, k, out):
        heads = linear.linear_heads(h, [wrap(q), wrap(k)])
        joined = linear.linear_joined(h, linear.Joined.of([wrap(q), wrap(k)]))
        y = linear.linear("btnh,nhd->btd", o, wrap(out))
        return sum((each * each).sum() for each in (*heads, *joined, y))

    gradients = jax.value_and_grad(value, argnums=(1, 2, 3))
    found, wanted = (
        jax.tree.leaves(jax.jit(gradients, static_argnums=0)(wrap, q, k, out))
        for wrap in (ByRow, lambda weights: weights)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
