"""Every backend of the grouped matmul against a loop over groups in float64; the GPU kernel is interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxscale.kernels.grouped_matmul.api import (
    BACKENDS,
    feed_forward,
    grouped_matmul,
    mosaic_refusal,
)
from jaxscale.kernels.grouped_matmul.swiglu import swiglu
from tests.kernels.interpretation import INTERPRET, KNOWS_THE_END, OLD_REASON

ROWS, K, N = 192, 64, 320  # N is no multiple of a block's columns
CASES = {  # of one shape, for which an interpreted kernel is compiled once
    "uneven_and_empty": [0, 70, 0, 122],
    "all_in_one": [0, 192, 0, 0],
    "one_row_each_and_a_rest": [1, 3, 1, 70],
    "none": [0, 0, 0, 0],
}
TOLERANCE = 4e-3  # of the norm: inputs and output in bfloat16, the sum in float32


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "mosaic" and not KNOWS_THE_END:
        pytest.skip(OLD_REASON)
    return dict(implementation=request.param, interpret=INTERPRET)


@pytest.fixture
def run(backend):
    return functools.partial(grouped_matmul, **backend)


def draw(group_sizes, dtype="bfloat16", size=(ROWS, K, N)):
    keys = jax.random.split(jax.random.key(len(group_sizes)), 3)
    num_rows, depth, width = size
    shapes = (num_rows, depth), (len(group_sizes), depth, width), (num_rows, width)
    rows, weights, cotangent = (
        jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, shapes, strict=True)
    )
    return rows, weights, jnp.array(group_sizes, jnp.int32), cotangent


def naive(rows, weights, group_sizes, cotangent):
    """The product and both gradients."""
    rows, weights, cotangent = (np.asarray(x, np.float64) for x in (rows, weights, cotangent))
    product, drows, dweights, start = (
        np.zeros(cotangent.shape),
        np.zeros(rows.shape),
        np.zeros(weights.shape),
        0,
    )
    for group, size in enumerate(np.asarray(group_sizes)):
        own = slice(start, start + size)
        product[own], drows[own] = rows[own] @ weights[group], cotangent[own] @ weights[group].T
        dweights[group] = rows[own].T @ cotangent[own]
        start += size
    return product, drows, dweights


def product_and_gradients(run, rows, weights, group_sizes, cotangent):
    product, pullback = jax.vjp(
        lambda rows, weights: run(rows, weights, group_sizes), rows, weights
    )
    return product, *pullback(cotangent)


@pytest.mark.parametrize("group_sizes", CASES.values(), ids=CASES)
def test_product_and_gradients_are_those_of_a_loop(run, group_sizes):
    arguments = draw(group_sizes)
    wanted = naive(*arguments)
    found = product_and_gradients(run, *arguments)
    for got, want in zip(found, wanted, strict=True):
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= TOLERANCE * np.linalg.norm(
            want
        )
    for got in found[:2]:
        assert not np.asarray(got[sum(group_sizes) :]).any(), "rows past the last group"


def test_sizes_that_are_no_multiple_of_a_tile(run):
    """Which the kernel is also lowered for a GPU with: interpretation does not know the rules of copies."""
    arguments = draw([60, 7], size=(75, 70, 33))
    found = product_and_gradients(run, *arguments)
    for got, want in zip(found, naive(*arguments), strict=True):
        assert got.shape == want.shape
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= TOLERANCE * np.linalg.norm(
            want
        )
    compiled = functools.partial(grouped_matmul, implementation=run.keywords["implementation"])
    lowering = jax.jit(functools.partial(product_and_gradients, compiled)).trace(*arguments)
    lowering.lower(lowering_platforms=("cuda",))


def test_twice_the_same_bits(run):
    arguments = draw(CASES["uneven_and_empty"])
    for a, b in zip(
        product_and_gradients(run, *arguments), product_and_gradients(run, *arguments), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_long_contraction_is_added_up_in_float32(run):
    """Rounded to bfloat16 after each of its 16 steps, the sum would be off by more than twice this."""
    arguments = draw([40, 24], size=(64, 1024, 64))
    product = np.asarray(run(*arguments[:3]), np.float64)
    wanted = naive(*arguments)[0]
    assert np.linalg.norm(product - wanted) <= TOLERANCE / 2 * np.linalg.norm(wanted)


def test_float16(run):
    arguments = draw(CASES["uneven_and_empty"], "float16")
    for got, want in zip(product_and_gradients(run, *arguments), naive(*arguments), strict=True):
        assert got.dtype == jnp.float16
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= TOLERANCE / 8 * np.linalg.norm(
            want
        )


def through_a_scan(run, rows, weights, group_sizes):
    one = jax.checkpoint(lambda rows, sizes: run(rows, weights, sizes))
    return jax.lax.scan(lambda _, sizes: (None, one(rows, sizes)), None, group_sizes[None])[1][0]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_under_jit_scan_and_remat_nothing_changes(implementation):
    run = functools.partial(grouped_matmul, implementation=implementation)
    arguments = draw(CASES["uneven_and_empty"])
    scanned = functools.partial(through_a_scan, run)
    got = jax.jit(functools.partial(product_and_gradients, scanned))(*arguments)
    for a, b in zip(got, product_and_gradients(run, *arguments), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        if jax.default_backend() == "cpu":
            np.testing.assert_array_equal(a, b)
        else:  # a GPU's products of two programs may differ in bfloat16's last bit
            assert np.linalg.norm(a - b) <= 2**-8 * np.linalg.norm(b)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_inside_a_manual_region_under_scan_and_remat(implementation):
    """Interpretation knows neither, so on a CPU the kernel is only lowered for GPUs."""
    run = functools.partial(
        through_a_scan, functools.partial(grouped_matmul, implementation=implementation)
    )
    mesh, each = Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data")
    local = jax.shard_map(
        functools.partial(product_and_gradients, run),
        mesh=mesh,
        in_specs=each,
        out_specs=each,
        check_vma=False,
    )
    arguments = [jnp.concatenate([x] * mesh.size) for x in draw(CASES["uneven_and_empty"])]
    lowered = jax.jit(local).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert ("mosaic_gpu" in lowered.as_text()) == (implementation == "mosaic")
    if implementation != "mosaic" or INTERPRET is False:
        for got, want in zip(
            jax.jit(local)(*arguments), naive(*draw(CASES["uneven_and_empty"])), strict=True
        ):
            want = np.concatenate([want] * mesh.size)
            assert np.linalg.norm(np.asarray(got, np.float64) - want) <= TOLERANCE * np.linalg.norm(
                want
            )


@pytest.mark.parametrize(
    ("rows", "weights", "message"),
    [
        (((256, 128), "float32"), ((2, 128, 64), "float32"), "both bfloat16 or both float16"),
        (((256, 128), "bfloat16"), ((2, 128, 64), "float16"), "both bfloat16 or both float16"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(rows, weights, message):
    rows, weights = jnp.zeros(*rows), jnp.zeros(*weights)
    assert message in mosaic_refusal(rows, weights)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(rows, weights, jnp.zeros(2, jnp.int32), implementation="mosaic")


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "weights", "groups"),
    [((8, 64), (2, 128, 64), 2), ((8, 64), (2, 64, 64), 3), ((0, 64), (2, 64, 64), 2)],
)
def test_shapes_that_do_not_fit_are_refused(implementation, rows, weights, groups):
    rows, weights = jnp.zeros(rows, "bfloat16"), jnp.zeros(weights, "bfloat16")
    with pytest.raises(
        ValueError, match=r"given rows \(.*expected \[rows, K\], \[E, K, 64\] and \[E\]"
    ):
        grouped_matmul(rows, weights, jnp.zeros(groups, jnp.int32), implementation=implementation)


def test_a_feed_forward_whose_matrices_do_not_fit_and_an_unknown_backend_are_refused():
    rows, up, sizes = (
        jnp.zeros((8, 64), "bfloat16"),
        jnp.zeros((2, 64, 128), "bfloat16"),
        jnp.zeros(2, jnp.int32),
    )
    down = up.swapaxes(1, 2)
    for gate, of_down in ((up[..., :64], down), (up, down[:, :64])):
        with pytest.raises(ValueError, match=r"feed_forward: given rows .*\[E, K, 128\]"):
            feed_forward(rows, gate, up, of_down, sizes, implementation="xla")
    with pytest.raises(ValueError, match="given implementation 'triton', expected one of"):
        feed_forward(rows, up, up, down, sizes, implementation="triton")


def naive_feed_forward(x, weights, group_sizes):
    """float64, differentiated by JAX."""
    ends = np.cumsum(group_sizes)
    of_row = np.searchsorted(ends, np.arange(len(x)), side="right")
    gate, up, down = (jnp.concatenate([w, jnp.zeros_like(w[:1])])[of_row] for w in weights)
    g, u = jnp.einsum("rd,rdf->rf", x, gate), jnp.einsum("rd,rdf->rf", x, up)
    return jnp.einsum("rf,rfd->rd", g * jax.nn.sigmoid(g) * u, down)


def draw_feed_forward(case, dtype="bfloat16"):
    """x, the cotangent and the matrices; F is no multiple of half a block, which holds the gate, nor of a tile."""
    num_experts, width = len(CASES[case]), 180
    keys = jax.random.split(jax.random.key(1), 5)
    shapes = (ROWS, K), (ROWS, K), *[(num_experts, K, width)] * 2, (num_experts, width, K)
    x, cotangent, *weights = (
        jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)
    )
    weights[0] /= 8  # gates of about 1, where the slope of SwiGLU changes most
    if dtype == "float16":
        weights = [w / 8 for w in weights]  # gradients stay far from the largest number
    return x, cotangent, *weights


def feed_forward_and_gradients(backend, sizes, x, cotangent, *weights):
    """The output without a backward, which keeps nothing for one, and with one, and all gradients."""

    def run(x, *weights):
        return feed_forward(x, *weights, jnp.array(sizes, jnp.int32), **backend)

    y, pullback = jax.vjp(run, x, *weights)
    return run(x, *weights), y, *pullback(cotangent)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("uneven_and_empty", "bfloat16"),
        ("one_row_each_and_a_rest", "bfloat16"),
        ("none", "bfloat16"),
        pytest.param("all_in_one", "bfloat16", marks=pytest.mark.long),
        pytest.param("one_row_each_and_a_rest", "float16", marks=pytest.mark.long),
    ],
)
def test_feed_forward_and_its_gradients_are_those_of_float64(backend, case, dtype):
    sizes, drawn = CASES[case], draw_feed_forward(case, dtype)
    with jax.enable_x64(True):
        x, cotangent, *weights = (jnp.asarray(a, "float64") for a in drawn)
        y, pullback = jax.vjp(lambda x, *w: naive_feed_forward(x, w, sizes), x, *weights)
        wanted = [np.asarray(a) for a in (y, y, *pullback(cotangent))]
    tolerance = 3 * TOLERANCE / (8 if dtype == "float16" else 1)
    for got, want in zip(feed_forward_and_gradients(backend, sizes, *drawn), wanted, strict=True):
        assert got.dtype == dtype
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= tolerance * np.linalg.norm(
            want
        )
        if got.shape == x.shape:
            assert not np.asarray(got[sum(sizes) :]).any(), "rows past the last group"


@pytest.mark.long
def test_feed_forward_twice_the_same_bits(backend):
    case = "one_row_each_and_a_rest"
    once, again = (
        feed_forward_and_gradients(backend, CASES[case], *draw_feed_forward(case)) for _ in range(2)
    )
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_gate_far_below_zero_has_a_gradient_of_zero():
    """exp(-g) is infinite there."""
    g = jnp.asarray([-80.0, -89.0, -1e4], jnp.bfloat16)
    value, gradient = jax.value_and_grad(lambda g: swiglu(g, jnp.ones_like(g)).sum())(g)
    assert abs(value) < 1e-30 and (jnp.abs(gradient) < 1e-30).all()


def test_feed_forward_refuses_what_the_kernel_cannot_do():
    rows, up, down = (
        jnp.zeros((8, 64), "bfloat16"),
        jnp.zeros((2, 64, 64), "bfloat16"),
        jnp.zeros((2, 64, 64)),
    )
    with pytest.raises(
        ValueError, match="feed_forward: given 'mosaic', expected rows and weights both bfloat16"
    ):
        feed_forward(rows, up, up, down, jnp.zeros(2, jnp.int32), implementation="mosaic")
