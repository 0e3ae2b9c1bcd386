"""One token's attention over a long cache by the kernel over pages, and when it is taken."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxscale.kernels import device as described
from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.launch.ahead_of_time import as_on, described_devices, has_plugin
from jaxscale.models.config.facts import from_flat
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.attention import AttentionContext, cache_kernels
from jaxscale.ops.attention import cache as kv_cache
from jaxscale.ops.device import is_hopper, name_kernels
from jaxscale.ops.precision import Policy
from jaxscale.serve.caches import empty_caches
from jaxscale.serve.decoding import Loop
from jaxscale.serve.sampling import SamplingConfig
from jaxscale.types import InputError
from tests.kernels.interpretation import INTERPRET, assert_norm_close, long_but

IS_NEW = jax.__version_info__ >= (0, 11)
needs_kernel = pytest.mark.skipif(not IS_NEW, reason="the kernel needs jax 0.11")
TOLERANCE = 4e-3  # of the norm, in bfloat16
CAPACITY, USED, PADDING = 384, 201, 77  # slots, those written, those of the second row's padding
# Query heads, kv heads, H, settings of the context.
CASES = {
    "a head a group of 96": (4, 4, 96, {}),
    "groups of 4 and a window": (8, 2, 64, {"window": 70}),
    "soft-cap and a scale": (2, 1, 128, {"softcap": 1.5, "scale": 0.2}),
}


def draw(case):
    """(queries, a filled cache, the context of one new token) of two rows, the second padded."""
    num_heads, num_kv_heads, head_dim, settings = CASES[case]
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 1, num_heads, head_dim))
    k, v = rng.normal(size=(2, 2, num_kv_heads, CAPACITY, head_dim))
    # Keys that are not seen may be NaN, and so may values in pages of which nothing is.
    k[:, :, USED:], v[:, :, USED:], v[:, :, 256:] = np.nan, 0, np.nan
    k[1, :, :PADDING], v[1, :, :64] = np.nan, np.nan
    positions = np.arange(CAPACITY) - np.asarray([[0], [PADDING]])
    positions = np.where(positions < 0, -1, positions)
    positions[:, USED:] = -1
    cache = kv_cache.KVCache(
        *(jnp.asarray(each, "bfloat16") for each in (k, v)),
        positions=jnp.asarray(positions),
        segments=jnp.asarray(positions >= 0, jnp.int32),
        length=jnp.int32(USED),
    )
    new = AttentionContext(cache.positions[:, USED - 1 : USED], **settings)
    return jnp.asarray(q, "bfloat16"), cache, new


def over_slots(q, cache, context):
    """By the interpreted kernel, or on a Hopper GPU by the kernel."""
    return cache_kernels.over_slots(q, cache.k, cache.v, seen(context, cache), interpret=INTERPRET)


def seen(context, cache):
    """The context with the cache's keys."""
    return dataclasses.replace(
        context,
        segments=cache.segments[:, USED - 1 : USED],
        key_positions=cache.positions,
        key_segments=cache.segments,
    )


@needs_kernel
@pytest.mark.parametrize("case", long_but(CASES, ("a head a group of 96",)))
def test_the_kernel_is_attention_over_the_cache(case):
    """In float32, of rows of two lengths, neither a multiple of a page."""
    q, cache, context = draw(case)
    wide = (jnp.nan_to_num(each.astype("float32")) for each in (q, cache.k, cache.v))
    wanted = kv_cache.over_keys(*wide, seen(context, cache))
    o = over_slots(q, cache, context)
    assert o.dtype == q.dtype
    assert_norm_close(o, wanted, TOLERANCE)


def packed(positions, segments):
    """A document behind another; in the second row they alternate."""
    positions[0, 100:USED], segments[0, 100:USED] = np.arange(USED - 100), 2
    segments[1, :USED] = 1 + np.arange(USED) % 2


def padded_between_turns(positions, segments):
    """In the second row padding of more than a page, in the first of a few slots."""
    for row, padding in ((0, slice(150, 153)), (1, slice(60, 190))):
        positions[row] -= padding.stop - padding.start
        positions[row, padding], segments[row, padding] = -1, 0
        before = slice(PADDING if row else 0, padding.start)
        positions[row, before] = np.arange(max(before.stop - before.start, 0))


def in_a_ring(positions, segments):
    """As if the oldest slots had been written over: positions fall once."""
    for row in range(2):
        positions[row, :USED] = 500 + np.roll(np.arange(USED), 1 - 40 - row)
        segments[row, :USED] = 1
    positions[:, USED - 1] = positions.max(1) + 1


def later_and_nothing(positions, segments):
    """The first row's token is at an early position; that of the second is padding."""
    positions[0, USED - 1] = 100
    positions[1, USED - 1], segments[1, USED - 1] = -1, 0


@needs_kernel
@pytest.mark.parametrize(
    ("place", "window"),
    [
        (packed, None),
        (padded_between_turns, None),
        (padded_between_turns, 60),
        (in_a_ring, 50),
        (later_and_nothing, None),
    ],
)
def test_the_slots_that_are_seen_may_be_any(place, window):
    """With holes, which were NaN once, and pages between of which nothing is seen."""
    q, cache, context = draw("soft-cap and a scale")
    positions, segments = np.array(cache.positions), np.array(cache.segments)
    place(positions, segments)
    cache = dataclasses.replace(
        cache,
        v=jnp.nan_to_num(cache.v),
        positions=jnp.asarray(positions),
        segments=jnp.asarray(segments),
    )
    new = cache.positions[:, USED - 1 : USED]
    context = dataclasses.replace(context, positions=new, window=window)
    mask = np.asarray(seen(context, cache).mask()[:, 0, 0])
    o = np.asarray(over_slots(q, cache, context), np.float64)
    wide = (jnp.nan_to_num(each.astype("float32")) for each in (q, cache.k, cache.v))
    wanted = np.asarray(kv_cache.over_keys(*wide, seen(context, cache)))
    wanted = np.where(mask.any(1)[:, None, None, None], wanted, 0)
    for row in range(2):
        assert_norm_close(o[row], wanted[row], TOLERANCE, row)
    is_hole = ~mask & (np.cumsum(mask, 1) > 0) & (np.cumsum(mask[:, ::-1], 1)[:, ::-1] > 0)
    assert is_hole.any() or place is later_and_nothing


def of_phi3(length, capacity, **settings):
    """Shapes (q, k, v, context, cache) of `length` new tokens of Phi-3-mini, one row."""
    heads = jax.ShapeDtypeStruct((1, length, 32, 96), "bfloat16")
    cache = jax.eval_shape(lambda: kv_cache.empty_cache(1, capacity, 32, 96, "bfloat16"))
    positions = jax.ShapeDtypeStruct((1, length), "int32")
    return heads, heads, heads, AttentionContext(positions, **settings), cache


def test_a_long_cache_is_whole_pages_and_a_short_one_as_asked():
    assert of_phi3(1, 65536 + 31)[-1].positions.shape == (1, 65600)
    assert of_phi3(1, 300)[-1].k.shape == (1, 32, 300, 96)
    assert of_phi3(1, 300)[-1].positions.shape == (1, 300)


@pytest.mark.parametrize(
    ("num_rows", "num_kv_heads", "is_long"),
    [(1, 8, True), (1, 7, False), (2, 33, True), (67, 1, False)],
)
def test_readers_that_leave_multiprocessors_idle_or_were_not_measured_are_left_to_xla(
    num_rows, num_kv_heads, is_long
):
    assert cache_kernels.is_long((num_rows, num_kv_heads, 2**17, 128), 2) == is_long


@pytest.mark.skipif(not has_plugin(), reason="jax-cuda13-plugin is not installed")
@pytest.mark.parametrize(
    ("length", "capacity", "settings", "chosen"),
    [
        (1, 65567, {}, "mosaic"),
        (1, 65567, {"window": 2047, "softcap": 3.0}, "mosaic"),
        (1, 4096, {}, None),
        (2, 65567, {}, None),
        (1, 65567, {"layout": BlockLayout()}, "xla"),
    ],
)
@needs_kernel
def test_on_an_h200_one_token_behind_a_long_cache_takes_the_kernel(
    length, capacity, settings, chosen, caplog
):
    """The cache is then written in place, and not copied for the kernel."""
    caplog.set_level(logging.INFO)
    device = described_devices("h200", num_hosts=1, gpus_per_host=1)[0]
    place = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        of_phi3(length, capacity, **settings),
    )
    with as_on([device]):
        lowered = jax.jit(kv_cache.attend, donate_argnums=4).lower(*arguments)
    assert ("mosaic_gpu" in lowered.as_text()) == (chosen == "mosaic")
    assert ("over a long cache: backend " in caplog.text) == (chosen is not None)
    if chosen is not None:
        assert f"over a long cache: backend {chosen}" in caplog.text
    if chosen == "mosaic":
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**22


def named(name, *arguments):
    """The shapes that a named backend gives."""
    return jax.eval_shape(functools.partial(kv_cache.attend, implementation=name), *arguments)


def test_what_the_kernel_cannot_do_is_said():
    """A backend that is named never falls back."""
    with pytest.raises(InputError, match="one new token a row, here 2"):
        named("mosaic", *of_phi3(2, 65567))
    with pytest.raises(InputError, match="a layout of blocks"):
        named("mosaic", *of_phi3(1, 65567, layout=BlockLayout()))
    with pytest.raises(InputError, match="capacity % 64 == 0, here 300"):
        named("mosaic", *of_phi3(1, 300))
    with pytest.raises(InputError, match="one of 'xla', 'mosaic'"):
        named("triton", *of_phi3(1, 320))


@pytest.mark.skipif(is_hopper(), reason="here it can")
def test_the_kernel_is_for_hopper_gpus():
    with pytest.raises(InputError, match="Hopper GPU" if IS_NEW else "jax >= 0.11"):
        named("mosaic", *of_phi3(1, 320))


@pytest.mark.parametrize("family", [None, "xla"])
def test_why_the_kernel_is_not_taken_is_logged(family, monkeypatch, caplog):
    """On a Hopper GPU whose run names other kernels nothing is missing."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(described, "compute_capability", lambda: family and "9.0")
    name_kernels(family)
    try:
        named(None, *of_phi3(1, 65567))
    finally:
        name_kernels(None)
    (record,) = caplog.records
    why = ", as mosaic needs a Hopper GPU" if family is None else ""
    assert record.getMessage().split(", of compute")[0].endswith(f"backend xla for bfloat16{why}")


@pytest.mark.parametrize("is_scanned", [False, True])
def test_only_unrolled_layers_ask_for_the_kernel(is_scanned, caplog):
    """In a loop over layers it would be given a copy of the cache, which takes longer than XLA."""
    caplog.set_level(logging.INFO)
    model = from_flat(
        vocab_size=8,
        num_layers=2,
        model_dim=16,
        max_length=2**17,
        ffn_dim=16,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
    )
    policy, execution = Policy(compute="bfloat16"), ExecutionConfig(is_scanned=is_scanned)
    decoder = Decoder(model, policy=policy, execution=execution)
    loop = Loop(decoder, SamplingConfig(), max_new_tokens=2, eos_id=None, num_tokens=None)

    def run(params, row):
        caches = empty_caches(decoder, 1, 2**16)
        return loop.onwards(decoder.prepared(params), caches, row, row, lambda logits, _: row)

    params = abstract_params(parameter_table(model), "float32")
    jax.eval_shape(run, params, jax.ShapeDtypeStruct((1,), "int32"))
    assert ("attention over a long cache" in caplog.text) != is_scanned
