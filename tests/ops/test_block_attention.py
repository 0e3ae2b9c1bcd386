"""Blocks of keys add up to attention over all of them, and their gradients too, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.ops.attention import attention as attend
from jaxscale.ops.attention import blockwise as block_attention
from jaxscale.ops.attention import chunked
from jaxscale.ops.attention import reference as attention
from jaxscale.ops.attention.context import NEVER, AttentionContext
from jaxscale.types import InputError

B, T, H = 2, 14, 4
CASES = {
    "plain": dict(),
    "grouped": dict(heads=(4, 2)),
    "documents": dict(documents=True),
    "window": dict(window=3, heads=(6, 2)),
    "softcap": dict(softcap=1.5, scale=0.7),
    "everything": dict(window=4, softcap=2.0, documents=True, heads=(4, 1)),
}


@pytest.fixture(autouse=True)
def _float64(monkeypatch):
    monkeypatch.setattr(block_attention, "QUERY_CHUNK", 4)  # does not divide T
    with jax.enable_x64(True):
        yield


def make(heads=(2, 2), documents=False, **settings):
    """(q, k, v), the cotangent of the output and the context."""
    rng = np.random.default_rng(0)
    q, k, v, do = (
        jnp.asarray(rng.normal(size=(B, T, n, H))) for n in (heads[0], heads[1], heads[1], heads[0])
    )
    positions, segments = np.tile(np.arange(T), (B, 1)), None
    if documents:
        lengths = [3, 8, T - 11]
        positions = np.tile(np.concatenate([np.arange(n) for n in lengths]), (B, 1))
        segments = jnp.asarray(np.tile(np.repeat([1, 2, 0], lengths), (B, 1)))
    return (q, k, v), do, AttentionContext(jnp.asarray(positions), segments, **settings)


def between(context, columns):
    segments = None if context.segments is None else context.segments[:, columns]
    return dataclasses.replace(
        context, key_positions=context.positions[:, columns], key_segments=segments
    )


forward = jax.jit(functools.partial(block_attention.forward, implementation="reference"))
backward = jax.jit(functools.partial(block_attention.backward, implementation="reference"))


@jax.jit
def wanted(q, k, v, do, context):
    o, pullback = jax.vjp(lambda q, k, v: attention.attend(q, k, v, context), q, k, v)
    return o, pullback(do)


def assert_close(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), got, wanted)


@pytest.mark.parametrize("case", CASES)
def test_one_block_of_all_keys_is_attention(case):
    (q, k, v), do, context = make(**CASES[case])
    o, lse = forward(q, k, v, context)
    assert_close((o, backward(q, k, v, context, o, lse, do)), wanted(q, k, v, do, context))


def test_blocks_add_up():
    (q, k, v), do, context = make(**CASES["everything"])
    blocks = [slice(0, 7), slice(7, T)]
    parts = [forward(q, k[:, b], v[:, b], between(context, b)) for b in blocks]
    lse = jax.nn.logsumexp(jnp.stack([lse for _, lse in parts]), axis=0)
    o = sum(o * jnp.exp(part - lse)[..., None] for o, part in parts)
    gradients = [backward(q, k[:, b], v[:, b], between(context, b), o, lse, do) for b in blocks]
    dq, dk, dv = zip(*gradients, strict=True)
    gradients = sum(dq), jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)
    assert_close((o, gradients), wanted(q, k, v, do, context))


@pytest.mark.parametrize("case", ["window", "everything"])
def test_chunks_of_queries_see_the_keys_that_they_are_given(case, monkeypatch):
    """Which are not the queries' own tokens."""
    monkeypatch.setattr(chunked, "QUERY_CHUNK", 7)
    (q, k, v), _, context = make(**CASES[case])
    keys = slice(2, 11)
    given = q, k[:, keys], v[:, keys], between(context, keys)
    got, reference = (
        jax.jit(functools.partial(attend, implementation=name))(*given)[0]
        for name in ("chunked", "reference")
    )
    sees = np.asarray(given[-1].mask().any(-1))[:, 0]
    assert sees.any() and not sees.all()
    assert_close(got[sees], reference[sees])


def test_a_query_that_sees_nothing_has_no_part_in_the_sum():
    (q, k, v), do, context = make()
    later = dataclasses.replace(context, key_positions=context.positions + T)
    o, lse = forward(q, k, v, later)
    assert not np.any(o) and np.all(np.asarray(lse) == NEVER)
    assert not any(map(np.any, backward(q, k, v, later, o, lse, do)))


@pytest.mark.parametrize(
    "settings, head_dim, expected",
    [
        (dict(documents=True), 4, "documents"),
        (dict(window=2), 4, "windows"),
        (dict(softcap=1.0), 4, "soft-cap"),
    ]
    + [(dict(), 4, "head_dim % 8 == 0")],
    ids=["documents", "window", "softcap", "head_dim"],
)
def test_what_cudnn_cannot_do_is_refused(settings, head_dim, expected):
    (q, _, _), _, context = make(**settings)
    with pytest.raises(InputError, match=expected):
        block_attention.check_backend("attention", "cudnn", q[..., :head_dim], context)


def test_an_unknown_backend_is_refused():
    (q, _, _), _, context = make()
    with pytest.raises(InputError, match="'reference', 'cudnn'"):
        block_attention.check_backend("attention", "chunked", q, context)
