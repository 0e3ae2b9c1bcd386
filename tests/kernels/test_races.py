"""No thread of a kernel for Hopper GPUs touches what another may still read or write.

JAX's interpretation knows what barriers and copies order. It runs one block, and does not know the
copies that add in memory: there attention's backward has a sum for each warpgroup.
"""

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.api import attention
from jaxscale.kernels.grouped_matmul.api import feed_forward
from jaxscale.kernels.grouped_matmul.swiglu import backward_of_some
from jaxscale.kernels.linear_cross_entropy.api import label_and_normaliser
from jaxscale.kernels.paged_attention import pallas as paged_attention
from jaxscale.kernels.rms_norm import pallas as rms_norm
from tests.kernels.interpretation import skip_unless_runnable

WATCHED = InterpretGPUParams(detect_races=True)


@pytest.fixture
def races(monkeypatch):
    """Calls a function; returns for each of its kernels whether threads raced in it."""
    skip_unless_runnable("mosaic")
    seen = []
    of_a_kernel = gpu_callbacks.GPURaceDetectionState

    def watch(**sizes):
        seen.append(of_a_kernel(**sizes))
        return seen[-1]

    monkeypatch.setattr(gpu_callbacks, "GPURaceDetectionState", watch)

    def races(function, *arguments):
        seen.clear()
        jax.block_until_ready(function(*arguments))
        return [each.races_found for each in seen]

    return races


def draw(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, shape, "bfloat16") for k, shape in zip(keys, shapes, strict=True)]


def forward_and_backward(function):
    def both(*arguments):
        y, pullback = jax.vjp(function, *arguments)
        return pullback(y)

    return both


@pytest.mark.long
@pytest.mark.parametrize("needs_tail", [False, True])
def test_the_experts_kernels(races, needs_tail):
    sizes = jnp.array([1, 0, 40, 3], jnp.int32)

    def run(*arguments):
        settings = dict(implementation="mosaic", interpret=WATCHED, needs_tail=needs_tail)
        return feed_forward(*arguments, sizes, **settings)

    drawn = draw((256, 64), (4, 64, 192), (4, 64, 192), (4, 192, 64))
    found = races(forward_and_backward(run), *drawn)
    # SwiGLU's backward of all rows is XLA's.
    assert len(found) == (7 if needs_tail else 8)
    assert not any(found)


@pytest.mark.long
@pytest.mark.parametrize("head_dim", [96, 128])
def test_attentions_kernels(races, head_dim):
    high = jnp.arange(1, 265)[None]

    def run(q, k, v):
        bounds = jnp.zeros_like(high), high
        settings = dict(scale=0.1, implementation="mosaic", interpret=WATCHED)
        return attention(q, k, v, *bounds, **settings)

    drawn = draw((1, 264, 2, head_dim), *[(1, 264, 1, head_dim)] * 2)
    assert races(forward_and_backward(run), *drawn) == [False, False]


@pytest.mark.long
def test_the_kernels_of_norms_and_of_the_loss(races):
    def norm(x, dx, dy):
        return rms_norm.backward(x, jnp.ones(128), dx, dy, epsilon=1e-6, interpret=WATCHED)

    assert races(norm, *draw(*[(24, 128)] * 3)) == [False]

    def loss(h, head):
        settings = dict(implementation="mosaic", interpret=WATCHED)
        label, normaliser = label_and_normaliser(h, head, jnp.arange(128), **settings)
        return normaliser - label

    found = races(forward_and_backward(loss), *draw((128, 128), (300, 128)))
    assert found and not any(found)


@pytest.mark.long
@pytest.mark.parametrize("has_mask", [False, True])
def test_a_stream_of_more_pages_than_shared_memory_holds(races, monkeypatch, has_mask):
    """The page, and its mask, that come next are put where others were read from."""
    monkeypatch.setattr(paged_attention, "NUM_SMS", 1)
    pages = draw(*[(8, 64, 1, 128)] * 2)
    table, high = jnp.arange(8)[None], jnp.asarray([500])
    mask = jnp.arange(512)[None] % 3 > 0 if has_mask else None

    def run(q):
        arrays = q, *pages, table, 0 * high, high
        settings = dict(scale=0.1, softcap=None, interpret=WATCHED)
        return paged_attention.paged_attention(*arrays, None, mask, **settings)

    assert races(run, *draw((1, 2, 128))) == [False]


@pytest.mark.long
def test_a_barrier_that_lacks_is_found(races, monkeypatch):
    """Else the tests above would show nothing."""
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)

    def run(*arguments):
        return backward_of_some(*arguments, jnp.int32(200), interpret=WATCHED)

    assert races(run, *draw(*[(200, 64)] * 3)) == [True]
