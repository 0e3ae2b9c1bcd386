"""Every backend of the attention kernel against float64; the GPU kernel is interpreted."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxscale.kernels import triton_call
from jaxscale.kernels.attention.api import (
    BACKENDS,
    VARYING,
    attention,
    gradients,
    refusal,
    row_sums,
)
from jaxscale.kernels.attention.tiles import BlockLayout
from tests.kernels.interpretation import (
    INTERPRET,
    assert_norm_close,
    but_triton,
    in_one_program,
    interpret_of,
    long_but,
    skip_unless_runnable,
)

IS_NEW = jax.__version_info__ >= (0, 11)
OLD_REASON = (
    "jax 0.10 cannot put a kernel that writes to a reference into a scan, so the kernel refuses it"
)
TOLERANCE = 4e-3  # of the norm, in bfloat16
LAYOUTS = {"blocks": BlockLayout(local=2, stride=3)}
# B, T, S, N, K, H, dtype, softcap, intervals
CASES = {
    "documents": (2, 200, 200, 2, 1, 64, "bfloat16", None, "documents"),
    "window_softcap_float16": (1, 144, 144, 1, 1, 128, "float16", 1.5, "window"),
    # One interval for both rows; six heads, which Triton starts four at a time.
    "full_odd_shapes": (2, 77, 131, 3, 3, 24, "bfloat16", None, "full"),
    "block_sparse": (1, 460, 460, 4, 2, 64, "bfloat16", None, "blocks"),
    "wide_heads": (1, 136, 136, 2, 1, 256, "bfloat16", 1.5, "documents"),
    "wide_heads_padded_float16": (1, 72, 72, 1, 1, 160, "float16", None, "window"),
    # Half a block at the end, which is whole tiles of the 32 tokens that heads of 256 have.
    "half_a_block": (1, 96, 96, 2, 1, 128, "bfloat16", None, "blocks"),
    "wide_heads_half_a_block": (1, 96, 96, 2, 1, 256, "bfloat16", None, "blocks"),
    "wide_heads_block_sparse": (1, 350, 350, 2, 2, 256, "bfloat16", None, "blocks"),
    "causal_two_tiles": (1, 264, 264, 2, 2, 64, "bfloat16", None, "causal"),
    # What most models train with.
    "causal_grouped_128": (1, 136, 136, 2, 1, 128, "bfloat16", None, "causal"),
    "heads_of_96": (1, 72, 72, 2, 2, 96, "bfloat16", None, "causal"),
    "heads_of_96_documents": (2, 200, 200, 2, 1, 96, "float16", 1.5, "documents"),
    "heads_of_96_block_sparse": (1, 320, 320, 2, 1, 96, "bfloat16", None, "blocks"),
    "documents_float16": (1, 136, 136, 2, 1, 64, "float16", None, "documents"),
}
# The others run in the long suite. These have each head dim, both types, every kind of mask but
# that of blocks, documents, a soft-cap, grouped heads and shapes that are padded.
DEFAULT = ("documents", "window_softcap_float16")


def intervals(kind, length, num_keys, batch):
    """low and high [B, T]; of "documents" the last query of each row sees nothing."""
    t = np.arange(length)
    if kind == "full":
        return np.zeros((1, length), np.int32), np.full((1, length), num_keys, np.int32)
    low, high = np.zeros((batch, length), np.int32), np.tile(t + 1, (batch, 1)).astype(np.int32)
    if kind == "window":
        low[:] = np.maximum(t - 40 + 1, 0)
    if kind == "documents":
        for row in range(batch):
            first = 90 + 45 * row
            low[row, first:] = first
        high[:, -1] = 0
    return low, high


def draw(case):
    """q, k, v, low, high, cotangents of both results, and the settings."""
    batch, length, num_keys, heads, kv_heads, dim, dtype, softcap, kind = CASES[case]
    shapes = (
        (batch, length, heads, dim),
        *[(batch, num_keys, kv_heads, dim)] * 2,
        (batch, length, heads, dim),
    )
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, do = (
        jax.random.normal(key, s).astype(dtype) for key, s in zip(keys[:4], shapes, strict=True)
    )
    dlse = jax.random.normal(keys[4], (batch, heads, length))
    low, high = map(jnp.asarray, intervals(kind, length, num_keys, batch))
    return (
        (q, k, v),
        (low, high),
        (do, dlse),
        dict(scale=dim**-0.5, softcap=softcap, layout=LAYOUTS.get(kind)),
    )


@functools.cache
def naive(case):
    """o, lse and the gradients in float64, by hand; lse is 0 where nothing is seen."""
    (q, k, v), (low, high), (do, dlse), settings = draw(case)
    q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (q, k, v, do, dlse))
    groups, scale, cap = q.shape[2] // k.shape[2], settings["scale"], settings["softcap"]
    keys, values = np.repeat(k, groups, 2), np.repeat(v, groups, 2)
    logits = np.einsum("btnh,bsnh->bnts", q, keys) * scale
    capped = cap * np.tanh(logits / cap) if cap else logits
    number = np.arange(k.shape[1])
    sees = ((number >= np.asarray(low)[..., None]) & (number < np.asarray(high)[..., None]))[
        :, None
    ]
    if layout := settings["layout"]:
        i, j = np.arange(q.shape[1])[:, None] // 64, number // 64
        head = np.arange(q.shape[2])[:, None, None]
        sees = sees & ((i - j < layout.local) | ((j + head + 1) % layout.stride == 0))
    exponentials = np.where(sees, np.exp(capped), 0)
    total = exponentials.sum(-1)
    lse = np.log(np.where(total > 0, total, 1))
    p = exponentials / np.where(total > 0, total, 1)[..., None]
    o = np.einsum("bnts,bsnh->btnh", p, values)
    dp = np.einsum("btnh,bsnh->bnts", do, values)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + dlse[..., None]) * scale
    ds *= 1 - (capped / cap) ** 2 if cap else 1

    def of_kv(x):
        return x.reshape(*k.shape[:3], groups, -1).sum(3)

    dk, dv = np.einsum("bnts,btnh->bsnh", ds, q), np.einsum("bnts,btnh->bsnh", p, do)
    return o, lse, np.einsum("bnts,bsnh->btnh", ds, keys), of_kv(dk), of_kv(dv)


@pytest.fixture(params=but_triton(BACKENDS))
def run(request):
    if request.param == "mosaic" and not IS_NEW:
        pytest.skip(OLD_REASON)
    skip_unless_runnable(request.param)
    backend = dict(implementation=request.param, interpret=interpret_of(request.param))
    return functools.partial(attention, **backend)


def results_and_gradients(run, arrays, bounds, cotangents, settings):
    def both(arrays, bounds, cotangents):
        (o, lse), pullback = jax.vjp(lambda q, k, v: run(q, k, v, *bounds, **settings), *arrays)
        do, dlse = cotangents
        return o, lse, *pullback((do, jnp.where(jnp.isfinite(lse), dlse, 0)))

    return in_one_program(both, run.keywords["implementation"])(arrays, bounds, cotangents)


@pytest.mark.parametrize(
    "run", ["reference", pytest.param("mosaic", marks=pytest.mark.long)], indirect=True
)
def test_phi3_smalls_layout_is_dense_attention_up_to_1024_tokens(run):
    """To the bit in the reference; the kernel, with fewer tokens, within its tolerance."""
    is_reference = run.keywords["implementation"] == "reference"
    length = 1024 if is_reference else 200
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (1, length, 1, 64), jnp.bfloat16) for key in keys]
    ends = jnp.arange(1, length + 1)[None]
    blocks, dense = (
        jax.jit(functools.partial(run, scale=0.125, layout=layout))(*arrays, 0 * ends, ends)[0]
        for layout in (BlockLayout(), None)
    )
    if is_reference:
        np.testing.assert_array_equal(blocks, dense)
    else:
        assert_norm_close(blocks, dense, TOLERANCE)


@pytest.mark.parametrize(
    ("run", "case"),
    [
        *itertools.product(("reference", "mosaic"), DEFAULT),
        ("triton", "window_softcap_float16"),
        *[
            pytest.param(name, case, marks=pytest.mark.long)
            for name, case in itertools.product(BACKENDS, CASES)
            if case not in DEFAULT or (name, case) == ("triton", "documents")
        ],
    ],
    indirect=["run"],
)
def test_results_and_gradients_are_those_of_float64(run, case):
    assert_results_and_gradients(run, case)


@pytest.mark.long
@pytest.mark.parametrize("case", ["half_a_block", "wide_heads_half_a_block", "heads_of_96"])
@pytest.mark.parametrize("capability", ["8.0", "8.6", "10.0"])
def test_with_the_blocks_of_other_gpus(capability, case):
    """Their tiles are smaller, so that the last ones of a block may lie past the end."""
    skip_unless_runnable("triton")
    backend = dict(implementation="triton", interpret=interpret_of("triton"))
    triton_call.use_blocks(triton_call._table()[capability])
    try:
        assert_results_and_gradients(functools.partial(attention, **backend), case)
    finally:
        triton_call.use_blocks({})


def assert_results_and_gradients(run, case):
    """Compares with float64."""
    arrays, bounds, cotangents, settings = draw(case)
    o, lse, *gradients = results_and_gradients(run, arrays, bounds, cotangents, settings)
    assert o.dtype == arrays[0].dtype
    sees_nothing = np.broadcast_to((bounds[1] <= bounds[0])[:, None], lse.shape)
    np.testing.assert_array_equal(np.isneginf(lse), sees_nothing)
    lse = np.where(sees_nothing, 0, lse)
    np.testing.assert_allclose(lse, naive(case)[1], atol=1e-3)
    tolerance = TOLERANCE / 4 if o.dtype == jnp.float16 else TOLERANCE
    for got, want in zip((o, *gradients), (naive(case)[0], *naive(case)[2:]), strict=True):
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= tolerance * np.linalg.norm(
            want
        )


def test_twice_the_same_bits_but_where_the_kernel_says_otherwise(run):
    """Several tiles of keys, so that more than one block adds to a query's gradient."""
    drawn = draw("causal_grouped_128")
    once, again = (results_and_gradients(run, *drawn) for _ in range(2))
    varying = VARYING.get(run.keywords["implementation"], ())
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), once, again, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        if name in varying:
            assert np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b), name
        else:
            np.testing.assert_array_equal(a, b, name)


def merged(run, q, k, v, low, high, *, split, **settings):
    """o and lse of the keys before `split` and of those after it, added up by their lse."""
    ranges = (k[:, :split], v[:, :split], 0), (k[:, split:], v[:, split:], split)
    parts = []
    for keys, values, first in ranges:
        bounds = (jnp.clip(bound - first, 0, keys.shape[1]) for bound in (low, high))
        parts.append(run(q, keys, values, *bounds, **settings))
    lse = jnp.logaddexp(*(lse for _, lse in parts))
    weights = (jnp.exp(part - lse).swapaxes(1, 2)[..., None] for _, part in parts)
    o = sum(weight * o.astype(jnp.float32) for weight, (o, _) in zip(weights, parts, strict=True))
    return o.astype(q.dtype), lse


def test_two_ranges_of_keys_add_up_to_attention_over_all(run):
    """What lse is for, and its gradient; half of the queries see none of the second range."""
    case = "heads_of_96"
    arrays, bounds, cotangents, settings = draw(case)
    in_two = functools.partial(merged, run, split=36, implementation=run.keywords["implementation"])
    found = results_and_gradients(in_two, arrays, bounds, cotangents, settings)
    np.testing.assert_allclose(found[1], naive(case)[1], atol=1e-3)
    for name, got, want in zip(("o", "lse", "dq", "dk", "dv"), found, naive(case), strict=True):
        assert np.linalg.norm(
            np.asarray(got, np.float64) - want
        ) <= 1.5 * TOLERANCE * np.linalg.norm(want), name


@pytest.mark.parametrize("case", long_but(("heads_of_96", "wide_heads"), ["heads_of_96"]))
def test_gradients_through_two_ranges_of_keys_add_up(run, case):
    """Given the output and lse over all keys; half of the queries see none of the second range."""
    (q, k, v), (low, high), (do, dlse), settings = draw(case)
    o, lse, *wanted = naive(case)
    lse, delta = jnp.asarray(lse, jnp.float32), row_sums(jnp.asarray(o), do) - dlse
    split, through = k.shape[1] // 2, []
    for keys, first in ((slice(0, split), 0), (slice(split, None), split)):
        bounds = (jnp.clip(bound - first, 0, k[:, keys].shape[1]) for bound in (low, high))
        arguments = q, k[:, keys], v[:, keys], do, lse, delta.astype("float32"), *bounds
        kept = {name: settings[name] for name in ("scale", "softcap")}
        through.append(gradients(*arguments, **kept, **run.keywords))
    (dq, *dkv), (dq_later, *dkv_later) = through
    joined = [jnp.concatenate(pair, 1) for pair in zip(dkv, dkv_later, strict=True)]
    for got, want in zip((dq + dq_later, *joined), wanted, strict=True):
        assert_norm_close(got, want, TOLERANCE)


def test_gradients_through_two_ranges_of_queries_add_up(run):
    """Each range meets all keys at once; the first sees none of the last ones."""
    (q, k, v), (low, high), (do, dlse), settings = draw("causal_grouped_128")
    o, lse, *wanted = naive("causal_grouped_128")
    lse, delta = jnp.asarray(lse, jnp.float32), row_sums(jnp.asarray(o), do) - dlse
    delta, split, through = delta.astype("float32"), q.shape[1] // 2, []
    for mine in (slice(0, split), slice(split, None)):
        rows = lse[:, :, mine], delta[:, :, mine], low[:, mine], high[:, mine]
        kept = {name: settings[name] for name in ("scale", "softcap")}
        through.append(gradients(q[:, mine], k, v, do[:, mine], *rows, **kept, **run.keywords))
    (dq, *dkv), (dq_later, *dkv_later) = through
    joined = jnp.concatenate([dq, dq_later], 1)
    for got, want in zip((joined, *map(jnp.add, dkv, dkv_later)), wanted, strict=True):
        assert_norm_close(got, want, TOLERANCE)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_inside_a_manual_region_under_scan_and_remat(implementation):
    """Interpretation knows neither, so on a CPU the kernel is only lowered for GPUs."""
    if implementation == "mosaic" and not IS_NEW:
        pytest.skip(OLD_REASON)
    if implementation == "triton" and INTERPRET:
        pytest.skip("Triton is interpreted here, and does not compile in the same process")
    arrays, bounds, cotangents, settings = draw("documents")

    def run(q, k, v, low, high, **settings):
        one = jax.checkpoint(lambda q: attention(q, k, v, low, high, **settings))
        return jax.tree.map(
            lambda x: x[0], jax.lax.scan(lambda _, q: (None, one(q)), None, q[None])[1]
        )

    run = functools.partial(run, implementation=implementation)
    mesh, each = Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data")
    local = jax.shard_map(
        lambda *a: results_and_gradients(run, *a, settings),
        mesh=mesh,
        in_specs=each,
        out_specs=each,
        check_vma=False,
    )
    lowered = jax.jit(local).trace(arrays, bounds, cotangents).lower(lowering_platforms=("cuda",))
    assert ("mosaic_gpu" in lowered.as_text()) == (implementation == "mosaic")
    if implementation != "mosaic" or INTERPRET is False:
        got = jax.jit(local)(arrays, bounds, cotangents)
        for a, b in zip(got, naive("documents"), strict=True):
            a = np.where(np.isfinite(a), np.asarray(a, np.float64), 0)  # an lse of nothing
            assert np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        (((1, 8, 2, 64), "float32"), ((1, 8, 1, 64), "float32"), "all bfloat16 or all float16"),
        (
            ((1, 8, 2, 264), "bfloat16"),
            ((1, 8, 1, 264), "bfloat16"),
            "head_dim <= 256, but head_dim = 264",
        ),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(q, k, message):
    q, k, bounds = jnp.zeros(*q), jnp.zeros(*k), jnp.zeros((1, 8), jnp.int32)
    assert message in refusal("mosaic", q, k)
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, bounds, bounds, scale=1.0, implementation="mosaic")


@pytest.mark.parametrize("implementation", BACKENDS)
def test_a_soft_cap_of_zero_is_refused(implementation):
    x, bounds = jnp.zeros((1, 8, 2, 64)), jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match=r"attention: given softcap 0\.0, expected above 0"):
        attention(x, x, x, bounds, bounds, scale=1.0, softcap=0.0, implementation=implementation)


@pytest.mark.parametrize(
    ("k", "v", "bounds", "message"),
    [
        (
            (2, 8, 2, 64),
            (2, 8, 2, 32),
            (2, 8),
            r"expected both \[B, S, K, H\] of one type, with B = 2 and H = 64",
        ),
        ((2, 8, 2, 32), (2, 8, 2, 32), (2, 8), "with B = 2 and H = 64"),
        ((1, 8, 2, 64), (1, 8, 2, 64), (2, 8), "with B = 2 and H = 64"),
        ((2, 9, 2, 64), (2, 8, 2, 64), (2, 8), r"given k float32\(2, 9, 2, 64\)"),
        ((2, 8, 3, 64), (2, 8, 3, 64), (2, 8), "given N = 4 and K = 3, expected N % K == 0"),
        (
            (2, 8, 2, 64),
            (2, 8, 2, 64),
            (3, 8),
            r"expected both \[B, T\] or \[1, T\], with B = 2 and T = 8",
        ),
        ((2, 9, 2, 64), (2, 9, 2, 64), (2, 9), r"given low \(2, 9\)"),
    ],
)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_shapes_that_do_not_fit_are_refused(implementation, k, v, bounds, message):
    bounds = jnp.zeros(bounds, jnp.int32)
    with pytest.raises(ValueError, match=message):
        attention(
            jnp.zeros((2, 8, 4, 64)),
            jnp.zeros(k),
            jnp.zeros(v),
            bounds,
            bounds,
            scale=1.0,
            implementation=implementation,
        )


@pytest.mark.skipif(not IS_NEW, reason=OLD_REASON)
def test_gradients_of_wide_heads_fit_in_shared_memory():
    """Which interpretation does not count."""
    arrays, bounds, cotangents, settings = draw("wide_heads")
    run = functools.partial(attention, implementation="mosaic")
    traced = jax.jit(lambda *a: results_and_gradients(run, *a, settings)).trace(
        arrays, bounds, cotangents
    )
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 2
