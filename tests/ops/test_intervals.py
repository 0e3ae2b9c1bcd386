"""Parts of a softmax add up whatever their size; what a chunk's attention cannot do is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.attention.intervals import Part, attention_over_intervals
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


def test_chunks_of_queries_are_the_reference_s_chunks():
    q = jax.ShapeDtypeStruct((1, 8, 2, 64), "float32")
    context = AttentionContext(jnp.zeros((1, 8), jnp.int32), softcap=2.0)
    found = attention_over_intervals(q, context, implementation="chunked")
    assert (found.scale, found.softcap, found.implementation) == (1 / 8, 2.0, "reference")
