"""The Evoformer's attention: its equation, its gradients, rows without keys, memory and shards."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxscale.ops.attention.evoformer import evoformer_attention
from jaxscale.types import InputError

NAMES = ("q", "k", "v", "mask_bias", "pair_bias")
# The kernel has a suite of its own, tests/kernels/test_evoformer_attention.py.
ON_ANY_DEVICE = ("reference", "chunked")
BIASES = list(itertools.product((False, True), repeat=2))
# B, M, T, S, N, H
SHAPES = {
    "one query, one key": (1, 3, 1, 1, 2, 8),
    "one query": (2, 2, 1, 19, 2, 8),
    "one key": (1, 2, 5, 1, 1, 16),
    "odd": (2, 3, 7, 7, 3, 24),
    "more keys": (1, 2, 13, 33, 2, 32),
    "fewer keys": (1, 3, 40, 17, 2, 8),
    "a multiple": (1, 1, 16, 64, 1, 64),
}


def draw(shape, biases=(True, True)):
    """Operands with some keys hidden, and a cotangent."""
    batch, rows, queries, keys, heads, width = shape
    rng = np.random.default_rng(0)
    of_queries, of_keys = ((batch, rows, n, heads, width) for n in (queries, keys))
    q, k, v, do = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in (of_queries, of_keys, of_keys, of_queries)
    )
    hidden = rng.random((batch, rows, 1, 1, keys)) < 0.3
    hidden[..., :1] = False
    mask_bias = np.where(hidden, -1e9, rng.normal(size=hidden.shape))
    pair_bias = rng.normal(size=(batch, 1, heads, queries, keys))
    both = (jnp.asarray(bias, jnp.float32) for bias in (mask_bias, pair_bias))
    return (q, k, v, *(bias if wanted else None for bias, wanted in zip(both, biases))), do


@functools.partial(jax.jit, static_argnames=("implementation", "key_chunk"))
def with_gradients(operands, do, implementation, key_chunk=4):
    """The output and the gradient of each operand."""

    def attend(*operands):
        return evoformer_attention(*operands, implementation=implementation, key_chunk=key_chunk)

    o, pullback = jax.vjp(attend, *operands)
    return o, *pullback(do)


def assert_close(got, want, tolerance=2e-6):
    """Largest difference over the largest value of each array, or over 1; the operands are of 1."""
    for name, a, b in zip(("o", *NAMES)[: len(want)], got, want, strict=True):
        assert (a is None) == (b is None), name
        if b is not None:
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert np.isfinite(b).all(), name
            assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1), name


@pytest.mark.parametrize("implementation", ON_ANY_DEVICE)
def test_it_is_the_equation(implementation):
    """Beside loops in float64."""
    (q, k, v, mask_bias, pair_bias), do = draw((2, 2, 3, 5, 2, 8))
    got = with_gradients((q, k, v, mask_bias, pair_bias), do, implementation)[0]
    q, k, v, mask_bias, pair_bias = (
        np.asarray(x, np.float64) for x in (q, k, v, mask_bias, pair_bias)
    )
    for b, m, t, n in np.ndindex(2, 2, 3, 2):
        logits = k[b, m, :, n] @ q[b, m, t, n] / np.sqrt(8)
        logits += mask_bias[b, m, 0, 0] + pair_bias[b, 0, n, t]
        weights = np.exp(logits - logits.max())
        want = weights / weights.sum() @ v[b, m, :, n]
        np.testing.assert_allclose(got[b, m, t, n], want, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_chunks_agree_with_the_reference(shape):
    operands, do = draw(shape)
    assert_close(with_gradients(operands, do, "chunked"), with_gradients(operands, do, "reference"))


@pytest.mark.parametrize("biases", BIASES, ids=["none", "pair", "mask", "both"])
def test_any_bias_may_be_absent(biases):
    operands, do = draw((1, 2, 6, 9, 2, 8), biases)
    got = with_gradients(operands, do, "chunked")
    assert_close(got, with_gradients(operands, do, "reference"))
    zeros = jnp.zeros((1, 2, 1, 1, 9)), jnp.zeros((1, 1, 2, 6, 9))
    filled = [zero if bias is None else bias for bias, zero in zip(operands[3:], zeros)]
    want = with_gradients((*operands[:3], *filled), do, "chunked")
    assert_close(got[:4], want[:4])


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_one_operand_alone(name):
    """Of a bias too where nothing else has a gradient."""
    operands, do = draw((1, 2, 5, 6, 2, 8))
    number = NAMES.index(name)

    def loss(operand):
        changed = (*operands[:number], operand, *operands[number + 1 :])
        return (evoformer_attention(*changed, key_chunk=4) * do).sum()

    got = jax.jit(jax.grad(loss))(operands[number])
    want = with_gradients(operands, do, "reference")[1 + number]
    np.testing.assert_allclose(got, want, atol=3e-6)


@pytest.mark.parametrize("key_chunk", [1, 3, 8, 9, 1000])
def test_the_size_of_chunks_does_not_matter(key_chunk):
    operands, do = draw((1, 2, 4, 9, 2, 8))
    got = with_gradients(operands, do, "chunked", key_chunk)
    assert_close(got, with_gradients(operands, do, "reference"))


@pytest.mark.parametrize("implementation", ON_ANY_DEVICE)
def test_a_query_without_keys_gives_zeros(implementation):
    """All of a row, by the mask bias, and one query of a row, by both; the others do not notice."""
    (q, k, v, masked, hidden), do = jax.tree.map(np.array, draw((1, 3, 4, 9, 2, 8)))
    masked[:, 1] = masked[..., 5:] = hidden[:, :, :, 2] = -np.inf
    found = with_gradients((q, k, v, masked, hidden), do, implementation)
    o, dq, dk, dv, dmask, dpair = map(np.asarray, found)
    assert all(np.isfinite(x).all() for x in (o, dq, dk, dv, dmask, dpair))
    for gone in (o[:, 1], dq[:, 1], dk[:, 1], dv[:, 1], dmask[:, 1], o[:, :, 2], dq[:, :, 2]):
        assert not gone.any()
    assert not dpair[:, :, :, 2].any()
    # The same with the queries that see something, and the keys that are seen.
    rows, queries = np.array([0, 2]), np.array([0, 1, 3])
    fewer = (
        q[:, rows][:, :, queries],
        k[:, rows, :5],
        v[:, rows, :5],
        masked[:, rows, ..., :5],
        hidden[:, :, :, queries, :5],
    )
    want = with_gradients(fewer, do[:, rows][:, :, queries], "reference")
    got = (
        o[:, rows][:, :, queries],
        dq[:, rows][:, :, queries],
        dk[:, rows, :5],
        dv[:, rows, :5],
        dmask[:, rows, ..., :5],
        dpair[:, :, :, queries, :5],
    )
    assert_close(got, want)


@pytest.mark.parametrize("implementation", ON_ANY_DEVICE)
def test_two_masks_whose_sum_is_infinite_hide_a_key(implementation):
    (q, k, v, *_), do = draw((1, 2, 3, 9, 2, 8))
    smallest = jnp.finfo(jnp.float32).min
    biases = jnp.full((1, 2, 1, 1, 9), smallest), jnp.full((1, 1, 2, 3, 9), smallest)
    for found in with_gradients((q, k, v, *biases), do, implementation):
        assert not found.any()


def test_no_keys_at_all():
    operands, do = draw((1, 2, 3, 0, 2, 8), (False, False))
    o, dq, *_ = with_gradients(operands, do, "chunked")
    assert o.shape == dq.shape == (1, 2, 3, 2, 8)
    assert not o.any() and not dq.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16], ids=["float32", "float16"])
def test_a_finite_mask_on_every_key_sees_them_all_alike(dtype):
    """-1e9 swallows the logarithm of the denominator; in float16 it is -inf, which hides all."""
    (q, k, v, *_), do = draw((1, 2, 4, 9, 2, 8))
    mask_bias = (1e9 * (jnp.zeros((1, 2, 1, 1, 9)) - 1)).astype(dtype)
    got = with_gradients((q, k, v, mask_bias, None), do, "chunked")
    assert_close(got, with_gradients((q, k, v, mask_bias, None), do, "reference"))
    mean = np.broadcast_to(v.mean(2, keepdims=True), got[0].shape)
    np.testing.assert_allclose(got[0], mean if dtype == jnp.float32 else 0 * mean, atol=1e-6)
    of_value = np.broadcast_to(do.sum(2, keepdims=True) / 9, v.shape)
    np.testing.assert_allclose(
        got[3], of_value if dtype == jnp.float32 else 0 * of_value, atol=1e-6
    )


@pytest.mark.parametrize(
    ("dtype", "width", "tolerance"),
    [("bfloat16", 8, 1e-2), ("bfloat16", 64, 1e-2), ("float16", 32, 1.5e-3)],
)
def test_half_types_stay_by_the_float32_reference(dtype, width, tolerance):
    """The type of the biases is their own, as that of their gradients is."""
    operands, do = draw((1, 3, 20, 37, 2, width))
    halves = [x.astype(dtype) for x in (*operands[:3], do)]
    operands = (*halves[:3], *operands[3:])
    got = with_gradients(operands, halves[3], "chunked")
    assert [x.dtype for x in got] == [jnp.dtype(dtype)] * 4 + [jnp.dtype("float32")] * 2
    *wide, do = (x.astype("float32") for x in halves)
    want = with_gradients((*wide, *operands[3:]), do, "reference")
    assert_close(got, want, tolerance)


def test_biases_in_bfloat16():
    operands, do = draw((1, 3, 6, 9, 2, 8))
    halves = [bias.astype(jnp.bfloat16) for bias in operands[3:]]
    got = with_gradients((*operands[:3], *halves), do, "chunked")
    assert got[4].dtype == got[5].dtype == jnp.bfloat16
    rounded = (*operands[:3], *(bias.astype(jnp.float32) for bias in halves))
    want = with_gradients(rounded, do, "reference")
    assert_close(got[:4], want[:4])
    assert_close(got[4:], want[4:], tolerance=2**-8)


def test_the_same_bits_again():
    operands, do = draw((1, 16, 12, 40, 2, 8))
    once, again = (with_gradients(operands, do, "chunked") for _ in range(2))
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("width", [8, 32])
def test_memory_is_a_fifth_of_the_plain_form(width):
    """OpenFold's MSA rows: 512 sequences of 256 residues, 8 heads; nothing is computed."""

    def temporaries(implementation):
        def step(operands, do):
            attend = functools.partial(evoformer_attention, implementation=implementation)
            o, pullback = jax.vjp(attend, *operands)
            return o, pullback(do)

        q = jax.ShapeDtypeStruct((1, 512, 256, 8, width), jnp.float32)
        mask_bias = jax.ShapeDtypeStruct((1, 512, 1, 1, 256), jnp.float32)
        pair_bias = jax.ShapeDtypeStruct((1, 1, 8, 256, 256), jnp.float32)
        lowered = jax.jit(step).lower((q, q, q, mask_bias, pair_bias), q)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    plain, chunked = temporaries("reference"), temporaries("chunked")
    print(f"temporaries: reference {plain / 2**20:.0f} MiB, chunked {chunked / 2**20:.0f} MiB")
    assert plain >= 5 * chunked


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_shards_of_batch_and_rows(check_vma):
    """Over both dims at once; the gradient of the pair bias is summed over the shards of rows."""
    operands, do = draw((2, 4, 5, 9, 2, 8))
    mesh = jax.make_mesh((2, 2), ("batch", "row"), axis_types=(AxisType.Auto,) * 2)
    own, pair = P("batch", "row"), P("batch")
    specs = (own, own, own, own, pair)

    def attend(*operands):
        return evoformer_attention(*operands, key_chunk=4)

    shards = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=own, check_vma=check_vma)

    def outside(operands, do):
        o, pullback = jax.vjp(shards, *operands)
        return o, *pullback(do)

    want = with_gradients(operands, do, "reference")
    assert_close(jax.jit(outside)(operands, do), want)

    def inside(operands, do):
        o, pullback = jax.vjp(attend, *operands)
        gradients = pullback(do)
        if not check_vma:
            gradients = (*gradients[:4], jax.lax.psum(gradients[4], "row"))
        return o, *gradients

    inside = jax.shard_map(
        inside, mesh=mesh, in_specs=(specs, own), out_specs=(own, *specs), check_vma=check_vma
    )
    assert_close(jax.jit(inside)(operands, do), want)


def test_a_map_over_models():
    operands, do = draw((1, 2, 3, 5, 2, 8))
    stacked = jax.tree.map(lambda x: jnp.stack([x, -x]), operands)
    got = jax.vmap(functools.partial(with_gradients, implementation="chunked"), (0, None))(
        stacked, do
    )
    other = jax.tree.map(lambda x: -x, operands)
    assert_close([x[1] for x in got], with_gradients(other, do, "reference"))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("k", (1, 2, 5, 2, 4)),
        ("v", (1, 2, 4, 2, 8)),
        ("q", (2, 3, 2, 8)),
        ("mask_bias", (1, 1, 1, 1, 5)),
        ("mask_bias", (1, 2, 5)),
        ("pair_bias", (1, 2, 2, 3, 5)),
        ("pair_bias", (1, 1, 2, 5, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape):
    operands, _ = draw((1, 2, 3, 5, 2, 8))
    wrong = dict(zip(NAMES, operands)) | {name: jnp.zeros(shape)}
    with pytest.raises(InputError, match=name if "bias" in name else r"\[B, M, S, N, H\]"):
        evoformer_attention(**wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "mosaic"}, "one of 'reference', 'chunked', 'triton'"),
        ({"implementation": "triton"}, "'triton', expected q, k and v all bfloat16 or all float16"),
        ({"key_chunk": 0}, "key_chunk"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    operands, _ = draw((1, 2, 3, 5, 2, 8))
    with pytest.raises(InputError, match=message):
        evoformer_attention(*operands, **options)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="here the kernel runs")
def test_the_kernel_is_refused_without_a_gpu():
    halves = [x.astype(jnp.bfloat16) for x in draw((1, 2, 3, 5, 2, 8))[0]]
    with pytest.raises(InputError, match=r"Triton|jax-triton|a GPU of compute capability 8\.0"):
        evoformer_attention(*halves, implementation="triton")


def test_types_that_differ_are_refused():
    (q, k, v, *_), _ = draw((1, 2, 3, 5, 2, 8))
    with pytest.raises(InputError, match="one type"):
        evoformer_attention(q, k.astype(jnp.bfloat16), v)
