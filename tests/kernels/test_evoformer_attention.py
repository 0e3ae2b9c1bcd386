"""Both backends of the Evoformer's attention against float64; the GPU kernels are interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxscale.kernels import triton_call
from jaxscale.kernels.evoformer_attention.api import BACKENDS, evoformer_attention, refusal
from tests.kernels.interpretation import (
    assert_norm_close,
    assert_same_bits,
    but_triton,
    in_one_program,
    interpret_of,
    pairs,
    skip_unless_runnable,
)

NAMES = ("o", "dq", "dk", "dv", "dmask", "dpair")
TOLERANCE = 4e-3  # of the norm, in bfloat16
BOTH = ("float32", "float32")
# B, M, T, S, N, H, type, types of the mask bias and of the pair bias
CASES = {
    # Several tiles, of which the last ones are not whole; more keys than queries.
    "several_tiles": (1, 2, 70, 131, 2, 8, "bfloat16", BOTH),
    "tiny": (2, 3, 5, 7, 1, 8, "float16", BOTH),
    "odd": (2, 3, 7, 5, 3, 24, "float16", BOTH),
    "fewer_keys": (1, 2, 100, 17, 1, 16, "bfloat16", BOTH),
    "one_key": (1, 2, 5, 1, 2, 32, "bfloat16", BOTH),
    "one_query": (2, 2, 1, 19, 2, 48, "float16", BOTH),
    "whole_tiles": (1, 2, 128, 64, 2, 32, "float16", BOTH),
    "whole_tiles_64": (2, 2, 64, 128, 1, 64, "bfloat16", BOTH),
    "heads_of_128": (1, 2, 65, 64, 1, 128, "bfloat16", BOTH),
    "heads_of_1": (1, 2, 33, 40, 2, 1, "float16", BOTH),
    "no_bias": (1, 2, 20, 37, 2, 32, "bfloat16", (None, None)),
    "mask_bias_alone": (1, 2, 20, 37, 2, 32, "bfloat16", ("float32", None)),
    "pair_bias_alone": (1, 2, 20, 37, 2, 32, "bfloat16", (None, "float32")),
    "half_biases": (1, 2, 20, 37, 2, 32, "float16", ("bfloat16", "float16")),
}
TINY = "tiny"


def draw(case):
    """Operands with some keys hidden, and a cotangent."""
    batch, rows, queries, keys, heads, width, dtype, types = CASES[case]
    rng = np.random.default_rng(0)
    of_queries, of_keys = ((batch, rows, n, heads, width) for n in (queries, keys))
    q, k, v, do = (
        jnp.asarray(rng.normal(size=size), dtype)
        for size in (of_queries, of_keys, of_keys, of_queries)
    )
    hidden = rng.random((batch, rows, 1, 1, keys)) < 0.3
    hidden[..., :1] = False
    mask_bias = np.where(hidden, -1e9, rng.normal(size=hidden.shape))
    pair_bias = rng.normal(size=(batch, 1, heads, queries, keys))
    biases = (
        None if each is None else jnp.asarray(bias, each)
        for bias, each in zip((mask_bias, pair_bias), types)
    )
    return (q, k, v, *biases), do


def naive(operands, do):
    """The output and all gradients in float64, by hand."""
    q, k, v, mask_bias, pair_bias = (
        np.zeros(1) if x is None else np.asarray(x, np.float64) for x in operands
    )
    do, scale = np.asarray(do, np.float64), q.shape[-1] ** -0.5
    logits = np.einsum("bmtnh,bmsnh->bmnts", q, k) * scale + mask_bias + pair_bias
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isinf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    weights /= np.where(total == 0, 1, total)
    dweights = np.einsum("bmtnh,bmsnh->bmnts", do, v)
    dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    return (
        np.einsum("bmnts,bmsnh->bmtnh", weights, v),
        np.einsum("bmnts,bmsnh->bmtnh", dlogits, k) * scale,
        np.einsum("bmnts,bmtnh->bmsnh", dlogits, q) * scale,
        np.einsum("bmnts,bmtnh->bmsnh", weights, do),
        None if operands[3] is None else dlogits.sum((2, 3), keepdims=True),
        None if operands[4] is None else dlogits.sum(1, keepdims=True),
    )


def by_backend(implementation):
    """The operation, interpreted where there is no GPU."""
    skip_unless_runnable(implementation)
    settings = dict(implementation=implementation, interpret=interpret_of(implementation))
    return functools.partial(evoformer_attention, **settings)


@pytest.fixture(params=BACKENDS)
def attend(request):
    return by_backend(request.param)


@pytest.fixture
def triton():
    return by_backend("triton")


def with_gradients(attend, operands, do):
    """The output and the gradient of each operand."""

    def both(operands, do):
        o, pullback = jax.vjp(attend, *operands)
        return o, *pullback(do)

    return in_one_program(both, attend.keywords["implementation"])(operands, do)


def assert_gradients(attend, operands, do, tolerance=TOLERANCE):
    """Compares with float64; gives what was found."""
    found = with_gradients(attend, operands, do)
    q, *_ = operands
    for name, operand, got, want in zip(NAMES, (q, *operands), found, naive(operands, do)):
        assert (got is None) == (want is None), name
        if want is not None:
            assert got.dtype == operand.dtype, name
            # Where there is one key, gradients of logits are nothing but rounding.
            size = max(np.linalg.norm(want), 1)
            assert np.linalg.norm(np.asarray(got, np.float64) - want) <= tolerance * size, name
    return found


@pytest.mark.parametrize(("implementation", "case"), pairs(BACKENDS, CASES, "several_tiles"))
def test_results_and_gradients_are_those_of_float64(implementation, case):
    assert_gradients(by_backend(implementation), *draw(case))


@pytest.mark.long
@pytest.mark.parametrize("case", ["several_tiles", "whole_tiles_64", "heads_of_128"])
@pytest.mark.parametrize("capability", ["8.0", "8.6", "10.0"])
def test_with_the_blocks_of_other_gpus(triton, capability, case):
    triton_call.use_blocks(triton_call._table()[capability])
    try:
        assert_gradients(triton, *draw(case))
    finally:
        triton_call.use_blocks({})


@pytest.mark.parametrize("num_parts", [1, 2])
def test_rows_divided_among_programs_add_up(triton, num_parts, monkeypatch):
    """The pair bias's gradient: of three rows in one part, and of two and one."""
    from jaxscale.kernels.evoformer_attention import triton_pair_gradient

    operands, do = draw(TINY)
    num_tiles = operands[0].shape[0] * operands[0].shape[3]
    monkeypatch.setattr(triton_pair_gradient, "PROGRAMS", num_parts * num_tiles)
    assert_norm_close(with_gradients(triton, operands, do)[5], naive(operands, do)[5], TOLERANCE)


def test_a_query_without_keys_gives_zeros(attend):
    """All of a row, by the mask bias, and one query of a row, by both; the others do not notice."""
    (q, k, v, mask_bias, pair_bias), do = draw(TINY)
    mask_bias = mask_bias.at[:, 1].set(-jnp.inf).at[..., 5:].set(-jnp.inf)
    pair_bias = pair_bias.at[:, :, :, 2].set(-jnp.inf)
    operands = q, k, v, mask_bias, pair_bias
    o, dq, dk, dv, dmask, dpair = map(np.asarray, assert_gradients(attend, operands, do))
    for gone in (o[:, 1], dq[:, 1], dk[:, 1], dv[:, 1], dmask[:, 1], o[:, :, 2], dq[:, :, 2]):
        assert not gone.any()
    assert not dpair[:, :, :, 2].any()


@pytest.mark.parametrize("value", [-1e9, np.finfo(np.float32).min])
def test_a_finite_mask_on_every_key_sees_them_all_alike(attend, value):
    """The first swallows the logarithm of the denominator; the second is all but -inf."""
    (q, k, v, mask_bias, _), do = draw(TINY)
    operands = q, k, v, jnp.full_like(mask_bias, value), None
    o, dq, dk, dv, *_ = with_gradients(attend, operands, do)
    v, do = (np.asarray(x, np.float64) for x in (v, do))
    assert_norm_close(o, np.broadcast_to(v.mean(2, keepdims=True), o.shape), TOLERANCE)
    of_values = do.sum(2, keepdims=True) / v.shape[2]
    assert_norm_close(dv, np.broadcast_to(of_values, v.shape), TOLERANCE)
    assert np.isfinite(dq).all() and np.isfinite(dk).all()


def test_biases_whose_exponential_overflows(attend):
    """Also that of what is beyond the last query, which has no logits of its own to subtract."""
    (q, k, v, mask_bias, pair_bias), do = draw(TINY)
    assert_gradients(attend, (q, k, v, mask_bias + 200, pair_bias), do)


def test_two_masks_whose_sum_is_infinite_hide_a_key(attend):
    (q, k, v, *biases), do = draw(TINY)
    biases = [jnp.full_like(bias, jnp.finfo(jnp.float32).min) for bias in biases]
    for found in with_gradients(attend, (q, k, v, *biases), do):
        assert not found.any()


def test_no_keys_and_no_rows_at_all(attend):
    for shape, keys in (((1, 2, 3, 2, 8), 0), ((1, 0, 3, 2, 8), 4)):
        q = do = jnp.ones(shape, jnp.bfloat16)
        k = jnp.ones((*shape[:2], keys, *shape[3:]), jnp.bfloat16)
        o, dq, dk, *_ = with_gradients(attend, (q, k, k, None, None), do)
        assert o.shape == dq.shape == shape and dk.shape == k.shape
        assert not o.any() and not dq.any() and not dk.any()


@pytest.mark.parametrize("attend", but_triton(BACKENDS), indirect=True)
def test_twice_the_same_bits(attend):
    drawn = draw("several_tiles")
    assert_same_bits(*(with_gradients(attend, *drawn) for _ in range(2)), names=NAMES)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_shards_of_batch_and_rows(triton, check_vma):
    """The gradient of the pair bias is summed over the shards of rows."""
    (q, k, v, mask_bias, pair_bias), do = draw("odd")
    q, k, v, mask_bias, do = (x[:, :2] for x in (q, k, v, mask_bias, do))
    operands = q, k, v, mask_bias, pair_bias
    sizes = (2, 2) if jax.device_count() > 3 else (1, 1)
    mesh = jax.make_mesh(sizes, ("batch", "row"), axis_types=(AxisType.Auto,) * 2)
    own, pair = P("batch", "row"), P("batch")
    specs = (own, own, own, own, pair)

    def inside(operands, do):
        o, *gradients = with_gradients(triton, operands, do)
        if not check_vma:
            gradients[-1] = jax.lax.psum(gradients[-1], "row")
        return o, *gradients

    shards = jax.shard_map(
        inside, mesh=mesh, in_specs=(specs, own), out_specs=(own, *specs), check_vma=check_vma
    )
    for name, got, want in zip(NAMES, jax.jit(shards)(operands, do), naive(operands, do)):
        assert_norm_close(got, want, TOLERANCE, name)


def test_under_vmap_scan_and_remat(triton):
    operands, do = draw(TINY)
    stacked = jax.tree.map(lambda x: jnp.stack([x, -x]), operands)
    want = with_gradients(triton, jax.tree.map(lambda x: -x, operands), do)

    def recomputed(operands):
        o, pullback = jax.vjp(jax.checkpoint(triton), *operands)
        return o, *pullback(do)

    def looped(operands):
        return jax.lax.map(recomputed, operands)

    mapped = jax.vmap(lambda operands: with_gradients(triton, operands, do))(stacked)
    for found in (mapped, jax.jit(looped)(stacked)):
        for name, got, each in zip(NAMES, found, want):
            assert_norm_close(got[1], each, TOLERANCE, name)


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (8, "float32", "q, k and v all bfloat16 or all float16, but they are float32"),
        (129, "bfloat16", "heads of width <= 128, but they are of 129"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(width, dtype, message):
    q = jnp.zeros((1, 2, 3, 2, width), dtype)
    assert refusal("reference", q) is None
    with pytest.raises(ValueError, match=f"given 'triton', expected {message}"):
        evoformer_attention(q, q, q, implementation="triton")


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("number", range(1, 5))
def test_shapes_that_do_not_fit_are_refused(implementation, number):
    operands, _ = draw(TINY)
    wrong = [x[:, :, 1:] if i == number else x for i, x in enumerate(operands)]
    with pytest.raises(ValueError, match=r"evoformer_attention: given .*, expected"):
        evoformer_attention(*wrong, implementation=implementation)
