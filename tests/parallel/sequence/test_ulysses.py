"""Ulysses equals attention on one device, value and gradient, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.ops import attention
from jaxscale.ops.attention import AttentionContext
from jaxscale.parallel.mesh import SEQUENCE, MeshConfig, make_mesh
from jaxscale.parallel.sequence.ulysses import spread_heads, ulysses
from jaxscale.types import InputError

B, T, H = 2, 24, 4
SHARE = P(None, SEQUENCE)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def inputs(num_heads, num_kv_heads, lengths=((5, 12, 4), (20, 1, 3))):
    """q, k, v, the output's cotangent, positions and segments.

    The documents cross the borders of shares, and there is padding.
    """
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.normal(size=(B, T, n, H)))
        for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]
    segments, positions = np.zeros((B, T), int), np.zeros((B, T), int)
    for row, of_row in enumerate(lengths):
        ends = np.cumsum(of_row)
        for number, (length, end) in enumerate(zip(of_row, ends, strict=True)):
            segments[row, end - length : end] = number + 1
            positions[row, end - length : end] = np.arange(length)
    return (*arrays, jnp.asarray(positions), jnp.asarray(segments))


def run(attend, settings, q, k, v, cotangent, positions, segments):
    context = AttentionContext(positions, segments, **settings)
    o, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, context, None)[0], q, k, v)
    return o, pullback(cotangent)


def on_one(settings, arguments):
    # Compiled at once: one by one, its operations would take much longer.
    return jax.jit(functools.partial(run, attention.attention, settings))(*arguments)


def on_members(num_members, settings, arguments, change=lambda attend: attend):
    mesh = make_mesh(MeshConfig(sequence=num_members), jax.devices()[:num_members])
    attend = change(ulysses(attention.attention, num_members=num_members))
    local = functools.partial(run, attend, settings)
    shared = jax.shard_map(local, mesh=mesh, in_specs=SHARE, out_specs=SHARE, check_vma=False)
    return jax.jit(shared)(*arguments)


def assert_close(got, wanted):
    def one(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)

    jax.tree.map(one, got, wanted)


HEADS = [
    (2, 8, 4, "members divide the kv heads"),
    (4, 8, 2, "kv heads divide the members"),
    (4, 8, 1, "multi-query"),
    (4, 12, 6, "neither, but both divide the heads"),
    (4, 6, 3, "neither, members do not divide the heads"),
    (4, 6, 6, "multi-head that members do not divide"),
    (4, 12, 3, "as many copies as heads"),
]


each_number_of_heads = pytest.mark.parametrize(
    ("num_members", "num_heads", "num_kv_heads"),
    [pytest.param(*numbers, id=name) for *numbers, name in HEADS],
)


@each_number_of_heads
def test_every_number_of_heads(num_members, num_heads, num_kv_heads):
    arguments = inputs(num_heads, num_kv_heads)
    wanted = on_one({}, arguments)
    got = on_members(num_members, {}, arguments)
    assert_close(got, wanted)


@pytest.mark.parametrize(
    "settings", [dict(window=7), dict(softcap=2.0), dict(scale=0.3), dict(is_causal=False)], ids=str
)
def test_the_context_is_the_whole_sequence_s(settings):
    arguments = inputs(4, 2)
    wanted = on_one(settings, arguments)
    got = on_members(4, settings, arguments)
    assert_close(got, wanted)


def without_segments(attend):
    def changed(q, k, v, context, cache):
        return attend(q, k, v, dataclasses.replace(context, segments=None), cache)

    return changed


def assert_rows_stand_as_heads(num_members, num_heads, num_kv_heads, **settings):
    *arrays, positions, _ = inputs(num_heads, num_kv_heads, ((T,), (T,)))
    wanted = on_one(settings, (*arrays, positions, None))
    got = on_members(num_members, settings, (*arrays, positions, positions), without_segments)
    assert_close(got, wanted)


@each_number_of_heads
def test_rows_of_one_document_stand_as_heads(num_members, num_heads, num_kv_heads):
    assert_rows_stand_as_heads(num_members, num_heads, num_kv_heads)


def test_rows_of_one_document_have_a_window():
    assert_rows_stand_as_heads(4, 8, 2, window=7)


@pytest.mark.long
@each_number_of_heads
def test_rows_of_one_document_have_a_window_whatever_the_heads(
    num_members, num_heads, num_kv_heads
):
    assert_rows_stand_as_heads(num_members, num_heads, num_kv_heads, window=7)


@pytest.mark.parametrize(
    "num_members, num_heads, num_kv_heads, copies", [(2, 8, 4, 1), (4, 8, 2, 2), (8, 16, 2, 4)]
)
def test_kv_heads_are_repeated_no_more_than_needed(num_members, num_heads, num_kv_heads, copies):
    q, k, v = (jnp.zeros((1, 2, n, H)) for n in (num_heads, num_kv_heads, num_kv_heads))
    q, k, v = spread_heads(q, k, v, num_members)
    assert q.shape[2] == num_heads
    assert k.shape[2] == v.shape[2] == copies * num_kv_heads


def test_heads_that_would_change_their_layout_of_blocks_are_refused():
    message = r"num_heads: given 12, expected N % \(sequence / ring \* 8\) == 0"
    with pytest.raises(InputError, match=message):
        on_members(4, dict(layout=BlockLayout()), inputs(12, 4))
