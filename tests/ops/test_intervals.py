"""Parts of a softmax add up whatever their size; what a chunk's attention cannot do is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.attention import reference
from jaxscale.ops.attention import AttentionContext, intervals_chunked
from jaxscale.ops.attention.intervals import attention_over_intervals
from jaxscale.ops.attention.parts import Part
from jaxscale.types import InputError


@pytest.mark.parametrize("distance", [0.0, 3.0, -300.0, 300.0])
def test_parts_add_up_without_overflow(distance):
    """Against numpy in float64; an exponential of 300 would overflow float32."""
    rng = np.random.default_rng(0)
    o, other = rng.normal(size=(2, 1, 5, 2, 3))
    lse = rng.normal(size=(1, 2, 5))
    other_lse = lse + distance
    share = np.moveaxis(1 / (1 + np.exp(other_lse - lse)), 1, 2)[..., None]
    parts = (
        Part(jnp.float32(o), jnp.float32(lse)),
        Part(jnp.float32(other), jnp.float32(other_lse)),
    )
    both = parts[0] + parts[1]
    np.testing.assert_allclose(both.o, share * o + (1 - share) * other, atol=1e-5)
    np.testing.assert_allclose(both.lse, np.logaddexp(lse, other_lse), rtol=1e-5)


def test_a_part_that_saw_no_key_adds_nothing():
    o = jnp.ones((1, 2, 1, 4))
    one, none = Part(o, jnp.zeros((1, 1, 2))), Part(0 * o, jnp.full((1, 1, 2), -jnp.inf))
    np.testing.assert_array_equal((one + none).o, o)
    np.testing.assert_array_equal((none + one).lse, 0)
    np.testing.assert_array_equal((none + none).o, 0)
    np.testing.assert_array_equal(((none + none) + one).o, o)


@pytest.mark.parametrize(
    ("fields", "backend", "message"),
    [
        (dict(is_causal=False), None, "a causal mask without layout of blocks"),
        ({}, "cudnn", "ExecutionConfig.attention: given 'cudnn', expected one of 'reference'"),
        ({}, "mosaic", "ExecutionConfig.attention: given 'mosaic'"),
    ],
)
def test_what_a_chunk_s_attention_cannot_do_is_refused(fields, backend, message):
    q = jax.ShapeDtypeStruct((1, 8, 2, 64), "float32")
    context = AttentionContext(jnp.zeros((1, 8), jnp.int32), **fields)
    with pytest.raises(InputError, match=message):
        attention_over_intervals(q, context, implementation=backend)


LENGTHS = [(13, 22), (8, 16), (3, 5)]  # queries, and keys


def intervals(num_queries, num_keys, rng):
    """Of two rows: some queries see nothing, some one key, some all."""
    low = rng.integers(0, num_keys, (2, num_queries))
    high = np.minimum(low + rng.integers(-1, 9, low.shape).clip(0), num_keys)
    low[:, -1], high[:, -1] = 0, num_keys
    return jnp.int32(low), jnp.int32(high)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attention_by_blocks_is_the_reference_s(lengths, softcap, monkeypatch):
    """Forward and gradients, as the sum over all keys has them, in blocks of 4."""
    monkeypatch.setattr(intervals_chunked, "BLOCK", 4)
    factors = dict(scale=0.6, softcap=softcap)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        num_queries, num_keys = lengths
        q, do = (jnp.asarray(rng.normal(size=(2, num_queries, 4, 8))) for _ in range(2))
        k, v = (jnp.asarray(rng.normal(size=(2, num_keys, 2, 8))) for _ in range(2))
        seen = intervals(num_queries, num_keys, rng)
        o, lse = reference.attention(q, k, v, *seen, **factors)
        part = jax.jit(lambda *x: intervals_chunked.forward(*x, **factors))(q, k, v, *seen)
        np.testing.assert_allclose(part.o, o, atol=1e-13)
        np.testing.assert_allclose(part.lse, lse, atol=1e-13)
        delta = jnp.asarray(rng.normal(size=lse.shape))
        operands = q, k, v, do, lse, delta, *seen
        found = jax.jit(lambda *x: intervals_chunked.backward(*x, **factors))(*operands)
        for one, other in zip(found, reference.gradients(*operands, **factors), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


def test_blocks_of_keys_in_bfloat16_are_added_up_in_float32(monkeypatch):
    """257 keys, each of which gives the gradient 1; in bfloat16 it would stay at 256."""
    monkeypatch.setattr(intervals_chunked, "BLOCK", 1)
    num = 257
    one = jnp.ones((1, num, 1, 1), jnp.bfloat16)
    low, high = jnp.zeros((1, num), jnp.int32), jnp.full((1, num), num, jnp.int32)
    lse, delta = jnp.ones((2, 1, 1, num))
    operands = one, one, one, one, lse, 0 * delta, low, high
    dq, dk, dv = intervals_chunked.backward(*operands, scale=1.0, softcap=None)
    for gradient in (dq, dk, dv):
        np.testing.assert_array_equal(gradient, num)


@pytest.mark.parametrize("num_queries", [2048, 512])
def test_the_logits_of_many_keys_are_never_there_as_a_whole(num_queries):
    q = jax.ShapeDtypeStruct((1, num_queries, 2, 64), "float32")
    k = jax.ShapeDtypeStruct((1, 2048, 2, 64), "float32")
    seen = (jax.ShapeDtypeStruct((1, num_queries), "int32"),) * 2
    by_head = (jax.ShapeDtypeStruct((1, 2, num_queries), "float32"),) * 2
    chosen = attention_over_intervals(q, AttentionContext(jnp.zeros((1, 8), jnp.int32)))
    assert chosen.implementation == "chunked"
    for program in (
        jax.make_jaxpr(chosen.forward)(q, k, k, *seen),
        jax.make_jaxpr(chosen.backward)(q, k, k, q, *by_head, *seen),
    ):
        assert "512,512]" in str(program)
        assert f"{num_queries},2048]" not in str(program)
