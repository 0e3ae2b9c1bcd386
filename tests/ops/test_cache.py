"""Attention over a cache equals attention over the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.ops.attention import AttentionContext, reference
from jaxscale.ops.attention import cache as kv_cache
from jaxscale.ops.attention.cache import empty_cache

attend = jax.jit(kv_cache.attend)


def make(rows=2, length=10):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(rows, length, n, 8)), jnp.float32) for n in (4, 2, 2))


def in_pieces(q, k, v, positions, segments, ends, capacity=12, **settings):
    """Feeds the tokens piece by piece; the output of all of them and the last cache."""
    cache, out, start = empty_cache(q.shape[0], capacity, 2, 8, "float32"), [], 0
    for end in ends:
        piece = slice(start, end)
        context = AttentionContext(
            positions[:, piece], None if segments is None else segments[:, piece], **settings
        )
        o, cache = attend(q[:, piece], k[:, piece], v[:, piece], context, cache)
        out.append(o)
        start = end
    return jnp.concatenate(out, 1), cache


@pytest.mark.parametrize("settings", [{}, {"window": 3}, {"softcap": 2.0}, {"scale": 0.1}])
@pytest.mark.parametrize("ends", [(10,), (6, 7, 8, 9, 10)])
def test_pieces_equal_the_whole(ends, settings):
    q, k, v = make()
    positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
    out, cache = in_pieces(q, k, v, positions, None, ends, **settings)
    np.testing.assert_allclose(
        out, reference.attend(q, k, v, AttentionContext(positions, **settings)), atol=1e-6
    )
    assert cache.length == 10
    assert (cache.positions[:, 10:] == -1).all()


def test_documents_in_the_cache_stay_apart():
    q, k, v = make()
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4, 5, 6, 7, 0]])
    segments = jnp.asarray([[1] * 4 + [2] * 6, [1] + [2] * 8 + [3]])
    out, _ = in_pieces(q, k, v, positions, segments, (3, 6, 10))
    np.testing.assert_allclose(
        out, reference.attend(q, k, v, AttentionContext(positions, segments)), atol=1e-6
    )


def test_prompts_of_several_lengths_pad_on_the_left():
    q, k, v = make()
    positions = jnp.stack([jnp.arange(10), jnp.arange(10) - 4])
    positions = jnp.where(positions < 0, -1, positions)
    out, _ = in_pieces(q, k, v, positions, None, (7, 8, 9, 10))
    alone = AttentionContext(jnp.arange(6)[None])
    np.testing.assert_allclose(
        out[1:, 4:], reference.attend(q[1:, 4:], k[1:, 4:], v[1:, 4:], alone), atol=1e-6
    )
    np.testing.assert_allclose(
        out[:1],
        reference.attend(q[:1], k[:1], v[:1], AttentionContext(jnp.arange(10)[None])),
        atol=1e-6,
    )
    assert jnp.isfinite(out).all()


def test_an_overflowing_cache_gives_nan_and_not_a_wrong_answer():
    q, k, v = make()
    positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
    out, _ = in_pieces(q, k, v, positions, None, (6, 10), capacity=8)
    assert jnp.isfinite(out[:, :6]).all()
    assert jnp.isnan(out[:, 6:]).all()


def test_the_cache_keeps_its_type():
    q, k, v = make()
    _, cache = attend(
        q, k, v, AttentionContext(jnp.zeros((2, 10), int)), empty_cache(2, 10, 2, 8, "bfloat16")
    )
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16
