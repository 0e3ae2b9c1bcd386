"""Ring attention equals attention on one device, value and gradient, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.launch.ahead_of_time import as_on, described_devices, has_plugin
from jaxscale.launch.collectives import collective_bytes
from jaxscale.ops.attention import AttentionContext, reference
from jaxscale.parallel.mesh import PIPELINE, SEQUENCE, MeshConfig, make_mesh
from jaxscale.parallel.sequence.layout import zigzag_order
from jaxscale.parallel.sequence.ring import ring_attention
from jaxscale.parallel.sequence.ulysses import ulysses
from jaxscale.types import InputError

B, T, N, K, H = 2, 32, 4, 2, 4
SHARE = P(None, SEQUENCE)
needs_plugin = pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
MASKS = {
    "plain": dict(),
    "documents": dict(documents=True),
    "window": dict(window=7),
    "everything": dict(documents=True, window=5, softcap=2.0, scale=0.3),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def inputs(documents=False, **settings):
    """q, k, v, the output's cotangent, positions, segments.

    The documents cross every border of the shares, and there is padding.
    """
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(B, T, n, H))) for n in (N, K, K, N)]
    if not documents:
        return (*arrays, jnp.asarray(np.tile(np.arange(T), (B, 1))), None), settings
    rows = [[5, 12, 9, 6], [20, 1, 3, 8]]
    positions = [np.concatenate([np.arange(n) for n in lengths]) for lengths in rows]
    segments = [np.repeat([1, 2, 3, 0], lengths) for lengths in rows]
    return (*arrays, jnp.asarray(np.stack(positions)), jnp.asarray(np.stack(segments))), settings


def run(attend, settings, q, k, v, cotangent, positions, segments):
    context = AttentionContext(positions, segments, **settings)
    o, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, context, None)[0], q, k, v)
    return o, pullback(cotangent)


def connected(ring, num_ulysses, uses_permute):
    attend = ring_attention(ring=ring, num_ulysses=num_ulysses, uses_permute=uses_permute)
    return ulysses(attend, num_members=num_ulysses, ring=ring) if num_ulysses > 1 else attend


def reference_attention(q, k, v, context, cache):
    return reference.attend(q, k, v, context), cache


@functools.cache
def wanted(mask):
    arguments, settings = inputs(**MASKS[mask])
    # Compiled at once: one by one, its operations would take much longer.
    return jax.jit(functools.partial(run, reference_attention, settings))(*arguments)


def in_region(config, local, arguments):
    """local(*shares) over the mesh, on arguments in zigzag order; its results in the sequence's."""
    order = zigzag_order(T, config.ring)
    mesh = make_mesh(config, jax.devices()[: np.prod(config.sizes)])
    shared = jax.shard_map(local, mesh=mesh, in_specs=SHARE, out_specs=SHARE, check_vma=False)
    result = jax.jit(shared)(*jax.tree.map(lambda x: np.asarray(x)[:, order], arguments))
    return jax.tree.map(lambda x: np.asarray(x)[:, np.argsort(order)], result)


def assert_close(got, wanted):
    def one(a, b):
        assert np.linalg.norm(a - b) <= 1e-12 * np.linalg.norm(b)

    jax.tree.map(one, got, wanted)


CASES = [
    (2, 1, "plain", True),
    (4, 1, "everything", True),
    (4, 1, "window", False),
    (2, 2, "everything", True),
    (2, 2, "documents", False),
]


def assert_as_on_one_device(ring, num_ulysses, mask, uses_permute):
    arguments, settings = inputs(**MASKS[mask])
    attend = connected(ring, num_ulysses, uses_permute)
    config = MeshConfig(sequence=ring * num_ulysses, ring=ring)
    got = in_region(config, functools.partial(run, attend, settings), arguments)
    assert_close(got, wanted(mask))


@pytest.mark.parametrize("ring, num_ulysses, mask, uses_permute", CASES)
def test_every_member_sees_what_it_should(ring, num_ulysses, mask, uses_permute):
    assert_as_on_one_device(ring, num_ulysses, mask, uses_permute)


RINGS = [(1, 2), (2, 1), (4, 1), (8, 1), (2, 2), (2, 4), (4, 2)]
# Each ring and each mask with permutes and with gathers, but not each pair of them.
EVERY = [
    (*members, mask, (i + j) % 2 == 0)
    for (i, members), (j, mask) in itertools.product(enumerate(RINGS), enumerate(MASKS))
    if (*members, mask) not in [case[:3] for case in CASES]
]


@pytest.mark.long
@pytest.mark.parametrize("ring, num_ulysses, mask, uses_permute", EVERY)
def test_every_ring_with_every_mask(ring, num_ulysses, mask, uses_permute):
    assert_as_on_one_device(ring, num_ulysses, mask, uses_permute)


@pytest.mark.parametrize("num_ulysses", [pytest.param(1, marks=pytest.mark.long), 2])
def test_what_is_gathered_is_right_where_only_one_stage_attends(num_ulysses):
    """A permute there is silently wrong on CPU, which pairs all devices and not each ring's."""
    arguments, settings = inputs(**MASKS["everything"])
    attend = connected(2, num_ulysses, uses_permute=False)

    def local(*arguments):
        def attended(*arguments):
            return run(attend, settings, *arguments)

        def idle(*arguments):
            return jax.tree.map(jnp.zeros_like, (arguments[0], arguments[:3]))

        result = lax.cond(lax.axis_index(PIPELINE) == 1, attended, idle, *arguments)
        return jax.tree.map(lambda x: lax.psum(x, PIPELINE), result)

    got = in_region(MeshConfig(pipeline=2, sequence=2 * num_ulysses, ring=2), local, arguments)
    assert_close(got, wanted("everything"))


def test_a_backend_that_cannot_is_refused():
    q = jnp.zeros((1, 4, 1, 8))
    context = AttentionContext(jnp.zeros((1, 4), int), window=2)
    with pytest.raises(InputError, match="windows"):
        ring_attention(ring=2, implementation="cudnn", uses_permute=True)(q, q, q, context, None)


def compiled(ring, uses_permute, f):
    """HLO of f(attend, q, k, v, do, positions) for H200s, with cuDNN's attention.

    A block of k is 64 x 2 x 64 bfloat16.
    """
    devices = described_devices("h200", num_hosts=1, gpus_per_host=ring)
    mesh = make_mesh(MeshConfig(sequence=ring, ring=ring), devices)
    attention = ring_attention(ring=ring, uses_permute=uses_permute, implementation="cudnn")
    sharding = NamedSharding(mesh, SHARE)
    shapes = [(1, ring * 64, num_heads, 64) for num_heads in (4, 2, 2, 4)]
    arguments = [jax.ShapeDtypeStruct(shape, "bfloat16", sharding=sharding) for shape in shapes]
    arguments.append(jax.ShapeDtypeStruct((1, ring * 64), "int32", sharding=sharding))

    def attend(q, k, v, positions):
        return attention(q, k, v, AttentionContext(positions), None)[0]

    local = functools.partial(f, attend)
    shared = jax.shard_map(local, mesh=mesh, in_specs=SHARE, out_specs=SHARE, check_vma=False)
    with as_on(devices):
        return jax.jit(shared).lower(*arguments).compile().as_text()


def forward(attend, q, k, v, do, positions):
    return attend(q, k, v, positions)


def both_ways(attend, q, k, v, do, positions):
    return jax.vjp(lambda *qkv: attend(*qkv, positions), q, k, v)[1](do)


@needs_plugin
def test_what_is_sent_round_is_keys_values_and_their_gradients():
    ring, block = 4, 64 * 2 * 64 * 2
    hlo = compiled(ring, True, both_ways)
    found = collective_bytes(hlo)
    there = (ring - 1) * 2 * block  # k and v
    back = (ring - 1) * 2 * 2 * block  # their gradients, in float32
    assert sum(collective_bytes(compiled(ring, True, forward))["collective-permute"]) == there
    # The backward sends the blocks again.
    assert sum(found.pop("collective-permute")) == 2 * there + back
    assert not any(found.values())
    assert hlo.count('"__cudnn$fmhaSoftmaxBackward"') == 1 + 2 * (ring - 1)


@needs_plugin
def test_what_is_gathered_is_keys_and_values_and_scattered_their_gradients():
    ring, block = 4, 64 * 2 * 64 * 2
    found = collective_bytes(compiled(ring, False, both_ways))
    assert sum(found.pop("all-gather")) == 2 * ring * 2 * block  # there and back
    assert sum(found.pop("reduce-scatter")) == 2 * 2 * block
    assert not any(found.values())
