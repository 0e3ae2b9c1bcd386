"""Each kernel under jax.vmap, forward and gradient, is a loop over calls; the kernels are interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.attention.api import attention
from jaxscale.kernels.grouped_matmul.api import feed_forward, grouped_matmul
from jaxscale.kernels.linear_cross_entropy.api import label_and_normaliser
from jaxscale.kernels.rms_norm.api import residual_norm
from tests.kernels.interpretation import INTERPRET, KNOWS_THE_END, OLD_REASON

pytestmark = pytest.mark.skipif(not KNOWS_THE_END, reason=OLD_REASON)
GPU = dict(implementation="mosaic", interpret=INTERPRET)
SIZES = jnp.asarray([5, 3], jnp.int32)
BOUNDS = jnp.zeros((1, 16), jnp.int32), jnp.arange(1, 17, dtype=jnp.int32)[None]
OPERATIONS = {
    "grouped_matmul": (lambda x, w: grouped_matmul(x, w, SIZES, **GPU), [(8, 64), (2, 64, 64)]),
    "feed_forward": (
        lambda x, g, u, d: feed_forward(x, g, u, d, SIZES, **GPU),
        [(8, 64), (2, 64, 64), (2, 64, 64), (2, 64, 64)],
    ),
    "label_and_normaliser": (
        lambda h, head: label_and_normaliser(h, head, jnp.arange(8), **GPU)[1],
        [(8, 64), (16, 64)],
    ),
    "residual_norm": (lambda x, w: residual_norm(x, w, epsilon=1e-3, **GPU)[1], [(3, 128), (128,)]),
    "attention": (
        lambda q, k, v: attention(q, k, v, *BOUNDS, scale=0.1, **GPU)[0],
        [(1, 16, 1, 64)] * 3,
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=[pytest.mark.long] * (n not in ("label_and_normaliser", "residual_norm"))
        )
        for n in OPERATIONS
    ],
)
def test_vmap_is_a_loop(name):
    run, shapes = OPERATIONS[name]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [
        jax.random.normal(key, (2, *shape)).astype("bfloat16")
        for key, shape in zip(keys, shapes, strict=True)
    ]

    def result_and_gradients(*arrays):
        y, pullback = jax.vjp(run, *arrays)
        return y, *pullback(jnp.ones_like(y))

    got = jax.vmap(result_and_gradients)(*arrays)
    loop = [result_and_gradients(*(a[i] for a in arrays)) for i in range(2)]
    for a, *b in zip(got, *loop, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(jnp.stack(b), np.float32)
        np.testing.assert_allclose(a, b, atol=1e-2 * np.abs(b).max())
        assert np.abs(b[0] - b[1]).max() > 0.1 * np.abs(b).max()
