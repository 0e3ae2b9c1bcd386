"""Each kernel under jax.vmap, forward and gradient, is a loop over calls.

The kernels are interpreted where there is no GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.attention.api import attention
from jaxscale.kernels.grouped_matmul.api import feed_forward, grouped_matmul
from jaxscale.kernels.linear_cross_entropy.api import label_and_normaliser
from jaxscale.kernels.rms_norm.api import residual_norm
from tests.kernels.interpretation import INTERPRET, KNOWS_THE_END, OLD_REASON, long_but

pytestmark = pytest.mark.skipif(not KNOWS_THE_END, reason=OLD_REASON)
GPU = dict(implementation="mosaic", interpret=INTERPRET)
SIZES = jnp.asarray([5, 3], jnp.int32)
LOW = jnp.zeros((1, 16), jnp.int32)
HIGH = jnp.arange(1, 17, dtype=jnp.int32)[None]


def normaliser(h, head):
    return label_and_normaliser(h, head, jnp.arange(8), **GPU)[1]


def norm(x, scale):
    return residual_norm(x, scale, epsilon=1e-3, **GPU)[1]


# Each with the shapes of its arguments.
OPERATIONS = {
    "grouped_matmul": (
        lambda x, w: grouped_matmul(x, w, SIZES, **GPU),
        [(8, 64), (2, 64, 64)],
    ),
    "feed_forward": (
        lambda x, gate, up, down: feed_forward(x, gate, up, down, SIZES, **GPU),
        [(8, 64), (2, 64, 64), (2, 64, 64), (2, 64, 64)],
    ),
    "label_and_normaliser": (normaliser, [(8, 64), (16, 64)]),
    "residual_norm": (norm, [(3, 128), (128,)]),
    "attention": (
        lambda q, k, v: attention(q, k, v, LOW, HIGH, scale=0.1, **GPU)[0],
        [(1, 16, 1, 64)] * 3,
    ),
}


@pytest.mark.parametrize("name", long_but(OPERATIONS, ("residual_norm",)))
def test_vmap_is_a_loop(name):
    run, shapes = OPERATIONS[name]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    drawn = zip(keys, shapes, strict=True)
    arrays = [jax.random.normal(key, (2, *shape)).astype("bfloat16") for key, shape in drawn]

    def result_and_gradients(*arrays):
        y, pullback = jax.vjp(run, *arrays)
        return y, *pullback(jnp.ones_like(y))

    got = jax.vmap(result_and_gradients)(*arrays)
    first, second = (result_and_gradients(*(array[i] for array in arrays)) for i in range(2))
    for mapped, *looped in zip(got, first, second, strict=True):
        mapped = np.asarray(mapped, np.float32)
        looped = np.asarray(jnp.stack(looped), np.float32)
        largest = np.abs(looped).max()
        np.testing.assert_allclose(mapped, looped, atol=1e-2 * largest)
        assert np.abs(looped[0] - looped[1]).max() > 0.1 * largest
