"""Attention over a cache equals attention over the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.ops.attention import AttentionContext, reference
from jaxscale.ops.attention import cache as kv_cache
from jaxscale.ops.attention.cache import empty_cache

CAPACITY = 12
attend = jax.jit(kv_cache.attend)
whole = jax.jit(reference.attend)


@functools.cache
def make(rows=2, length=10):
    rng = np.random.default_rng(0)
    shapes = [(rows, length, heads, 8) for heads in (4, 2, 2)]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def in_pieces(positions, segments, ends, **settings):
    """Feeds the tokens of `make` piece by piece; the output of all of them and the last cache."""
    cache, out, start = empty_cache(2, CAPACITY, 2, 8, "float32"), [], 0
    # On the host, so that nothing but `attend` is compiled.
    q, k, v, positions = map(np.asarray, (*make(), positions))
    segments = None if segments is None else np.asarray(segments)
    for end in ends:
        piece = slice(start, end)
        of_piece = None if segments is None else segments[:, piece]
        context = AttentionContext(positions[:, piece], of_piece, **settings)
        o, cache = attend(q[:, piece], k[:, piece], v[:, piece], context, cache)
        out.append(np.asarray(o))
        start = end
    return np.concatenate(out, 1), cache


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({}, (10,)),
        ({}, (6, 7, 8, 9, 10)),
        ({"window": 3}, (6, 7, 8, 9, 10)),
        ({"softcap": 2.0, "scale": 0.1}, (6, 7, 8, 9, 10)),
        pytest.param({"window": 3}, (10,), marks=pytest.mark.long),
        pytest.param({"softcap": 2.0}, (10,), marks=pytest.mark.long),
        pytest.param({"scale": 0.1}, (10,), marks=pytest.mark.long),
        pytest.param({"softcap": 2.0}, (6, 7, 8, 9, 10), marks=pytest.mark.long),
        pytest.param({"scale": 0.1}, (6, 7, 8, 9, 10), marks=pytest.mark.long),
    ],
)
def test_pieces_equal_the_whole(settings, ends):
    positions = np.broadcast_to(np.arange(10), (2, 10))
    out, cache = in_pieces(positions, None, ends, **settings)
    wanted = whole(*make(), AttentionContext(positions, **settings))
    np.testing.assert_allclose(out, wanted, atol=1e-6)
    assert cache.length == 10
    assert (np.asarray(cache.positions)[:, 10:] == -1).all()


def test_without_a_causal_mask_a_query_sees_all_that_came_before_and_its_own_piece():
    positions = np.broadcast_to(np.arange(10), (2, 10))
    out, _ = in_pieces(positions, None, (10,), is_causal=False)
    wanted = whole(*make(), AttentionContext(positions, is_causal=False))
    np.testing.assert_allclose(out, wanted, atol=1e-6)


def test_documents_in_the_cache_stay_apart():
    positions = np.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4, 5, 6, 7, 0]])
    segments = np.asarray([[1] * 4 + [2] * 6, [1] + [2] * 8 + [3]])
    out, _ = in_pieces(positions, segments, (4, 7, 10))
    wanted = whole(*make(), AttentionContext(positions, segments))
    np.testing.assert_allclose(out, wanted, atol=1e-6)


def test_prompts_of_several_lengths_pad_on_the_left():
    positions = np.stack([np.arange(10), np.arange(10) - 4])
    positions = np.where(positions < 0, -1, positions)
    out, _ = in_pieces(positions, None, (6, 7, 8, 9, 10))
    q, k, v = make()
    alone = whole(q[1:, 4:], k[1:, 4:], v[1:, 4:], AttentionContext(np.arange(6)[None]))
    np.testing.assert_allclose(out[1:, 4:], alone, atol=1e-6)
    first = whole(q[:1], k[:1], v[:1], AttentionContext(np.arange(10)[None]))
    np.testing.assert_allclose(out[:1], first, atol=1e-6)
    assert np.isfinite(out).all()


def test_an_overflowing_cache_gives_nan_and_not_a_wrong_answer():
    """A full one does not."""
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    q, k, v = (x[:, :6] for x in make())
    cache = empty_cache(2, CAPACITY, 2, 8, "float32")
    for is_finite in (True, True, False):
        o, cache = attend(q, k, v, AttentionContext(positions), cache)
        assert (np.isfinite(o) == is_finite).all()


def test_the_cache_keeps_its_type():
    cache = empty_cache(2, 10, 2, 8, "bfloat16")
    context = AttentionContext(jnp.zeros((2, 10), int))
    shapes = jax.eval_shape(kv_cache.attend, *make(), context, cache)[1]
    assert shapes.k.dtype == shapes.v.dtype == jnp.bfloat16
    assert shapes.k.shape == (2, 2, 10, 8)  # heads before slots


@pytest.mark.parametrize("segments", [None, np.ones((2, 10), int)], ids=["none", "one document"])
def test_the_first_pass_leaves_the_cache_that_attention_over_it_leaves(segments):
    """By a backend of `attention`, over the new tokens alone; padding is on the left."""
    positions = np.stack([np.arange(10), np.maximum(np.arange(10) - 4, -1)])
    context = AttentionContext(positions, segments)
    empty = empty_cache(2, CAPACITY, 2, 8, "float32")
    prefill = jax.jit(functools.partial(kv_cache.prefill, implementation="reference"))
    o, cache = prefill(*make(), context, empty)
    wanted, wanted_cache = attend(*make(), context, empty)
    jax.tree.map(np.testing.assert_array_equal, cache, wanted_cache)
    is_token = positions >= 0
    np.testing.assert_allclose(np.asarray(o)[is_token], wanted[is_token], atol=1e-6)
