"""Every backend of the grouped matmul against a loop over groups in float64.

The GPU kernel is interpreted where there is no GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.grouped_matmul import pallas
from jaxscale.kernels.grouped_matmul.api import (
    BACKENDS,
    grouped_matmul,
    matmul,
    refusal,
)
from jaxscale.kernels.grouped_matmul.block_sizes import H200, NARROW
from tests.kernels.interpretation import (
    INTERPRET,
    assert_norm_close,
    assert_same_bits,
    but_triton,
    in_a_manual_region,
    interpret_of,
    long_but,
    lower_for_gpu,
    skip_unless_runnable,
)

ROWS, DEPTH = 192, 64
WIDTH = 320  # no multiple of a block's columns
# Of one shape, for which an interpreted kernel is compiled once.
CASES = {
    "uneven_and_empty": [0, 70, 0, 122],
    "all_in_one": [0, 192, 0, 0],
    "one_row_each_and_a_rest": [1, 3, 1, 70],
    "none": [0, 0, 0, 0],
}
TOLERANCE = 4e-3  # of the norm: inputs and output in bfloat16, the sum in float32


@pytest.fixture(params=BACKENDS)
def implementation(request):
    skip_unless_runnable(request.param)
    return request.param


def compiled_twin(f, implementation):
    """f, compiled as one program unless it is an interpreted kernel, which is run call by call."""
    return jax.jit(f) if implementation in ("reference", "xla") else f


def draw(group_sizes, dtype="bfloat16", size=(ROWS, DEPTH, WIDTH)):
    """Rows, weights, group sizes and the cotangent of the product."""
    num_rows, depth, width = size
    keys = jax.random.split(jax.random.key(len(group_sizes)), 3)
    rows = jax.random.normal(keys[0], (num_rows, depth)).astype(dtype)
    weights = jax.random.normal(keys[1], (len(group_sizes), depth, width)).astype(dtype)
    cotangent = jax.random.normal(keys[2], (num_rows, width)).astype(dtype)
    return rows, weights, jnp.array(group_sizes, jnp.int32), cotangent


def naive(rows, weights, group_sizes, cotangent):
    """The product and both gradients."""
    rows, weights, cotangent = (np.asarray(x, np.float64) for x in (rows, weights, cotangent))
    product, drows, dweights = map(np.zeros_like, (cotangent, rows, weights))
    start = 0
    for group, size in enumerate(np.asarray(group_sizes)):
        of_group = slice(start, start + size)
        product[of_group] = rows[of_group] @ weights[group]
        drows[of_group] = cotangent[of_group] @ weights[group].T
        dweights[group] = rows[of_group].T @ cotangent[of_group]
        start += size
    return product, drows, dweights


def product_and_gradients(run, rows, weights, group_sizes, cotangent):
    def product_of(rows, weights):
        return run(rows, weights, group_sizes)

    product, pullback = jax.vjp(product_of, rows, weights)
    return product, *pullback(cotangent)


def found(implementation, arguments):
    """Product and gradients by a backend."""
    run = functools.partial(
        grouped_matmul, implementation=implementation, interpret=interpret_of(implementation)
    )
    f = functools.partial(product_and_gradients, run)
    return compiled_twin(f, implementation)(*arguments)


@functools.cache
def found_in_case(implementation, case, dtype="bfloat16"):
    """Once for all tests."""
    return found(implementation, draw(CASES[case], dtype))


@pytest.mark.parametrize("case", long_but(CASES, ("uneven_and_empty",)))
def test_product_and_gradients_are_those_of_a_loop(implementation, case):
    group_sizes = CASES[case]
    results = found_in_case(implementation, case)
    for got, want in zip(results, naive(*draw(group_sizes)), strict=True):
        assert_norm_close(got, want, TOLERANCE)
    product, drows, _ = results
    for got in (product, drows):
        assert not np.asarray(got[sum(group_sizes) :]).any(), "rows past the last group"


def test_sizes_that_are_no_multiple_of_a_tile(implementation):
    """The program for a GPU is made too: interpretation does not know the rules of copies."""
    arguments = draw([60, 7], size=(75, 70, 33))
    for got, want in zip(found(implementation, arguments), naive(*arguments), strict=True):
        assert got.shape == want.shape
        assert_norm_close(got, want, TOLERANCE)
    if implementation != "triton":
        run = functools.partial(grouped_matmul, implementation=implementation)
        program = lower_for_gpu(functools.partial(product_and_gradients, run), *arguments)
        assert ("mosaic_gpu" in program) == (implementation == "mosaic")


@pytest.mark.parametrize("implementation", but_triton(BACKENDS), indirect=True)
def test_twice_the_same_bits(implementation):
    case = "uneven_and_empty"
    again = found(implementation, draw(CASES[case]))
    assert_same_bits(found_in_case(implementation, case), again)


@pytest.mark.parametrize("implementation", but_triton(BACKENDS), indirect=True)
def test_a_long_contraction_is_added_up_in_float32(implementation):
    """Rounded to bfloat16 after each of 16 steps, the sum would be off by more than twice this."""
    arguments = draw([40, 24], size=(64, 1024, 64))
    rows, weights, group_sizes, _ = arguments
    product = grouped_matmul(
        rows,
        weights,
        group_sizes,
        implementation=implementation,
        interpret=interpret_of(implementation),
    )
    wanted, _, _ = naive(*arguments)
    assert_norm_close(product, wanted, TOLERANCE / 2)


@pytest.mark.long
def test_float16(implementation):
    case = "uneven_and_empty"
    results = found_in_case(implementation, case, "float16")
    for got, want in zip(results, naive(*draw(CASES[case], "float16")), strict=True):
        assert got.dtype == jnp.float16
        assert_norm_close(got, want, TOLERANCE / 8)


def through_a_scan(run, rows, weights, group_sizes):
    one = jax.checkpoint(lambda rows, sizes: run(rows, weights, sizes))
    _, products = jax.lax.scan(lambda _, sizes: (None, one(rows, sizes)), None, group_sizes[None])
    return products[0]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_under_jit_scan_and_remat_nothing_changes(implementation):
    case = "uneven_and_empty"
    run = functools.partial(grouped_matmul, implementation=implementation)
    scanned = functools.partial(through_a_scan, run)
    got = jax.jit(functools.partial(product_and_gradients, scanned))(*draw(CASES[case]))
    wanted = found_in_case(implementation, case)
    if jax.default_backend() == "cpu":
        assert_same_bits(got, wanted)
    else:
        # Products of two programs of a GPU may differ in bfloat16's last bit.
        for a, b in zip(got, wanted, strict=True):
            assert_norm_close(a, b, 2**-8)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_inside_a_manual_region_under_scan_and_remat(implementation):
    multiply = functools.partial(grouped_matmul, implementation=implementation)
    run = functools.partial(through_a_scan, multiply)
    drawn = draw(CASES["uneven_and_empty"])
    found = in_a_manual_region(functools.partial(product_and_gradients, run), drawn, implementation)
    if found is None:
        return
    for got, want in zip(found, naive(*drawn), strict=True):
        assert_norm_close(got, np.concatenate([want, want]), TOLERANCE)


@pytest.mark.parametrize(
    ("rows", "weights"),
    [
        (((256, 128), "float32"), ((2, 128, 64), "float32")),
        (((256, 128), "bfloat16"), ((2, 128, 64), "float16")),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(rows, weights):
    message = "both bfloat16 or both float16"
    rows, weights = jnp.zeros(*rows), jnp.zeros(*weights)
    assert message in refusal("mosaic", rows, weights)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(rows, weights, jnp.zeros(2, jnp.int32), implementation="mosaic")


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "weights", "groups"),
    [((8, 64), (2, 128, 64), 2), ((8, 64), (2, 64, 64), 3), ((0, 64), (2, 64, 64), 2)],
)
def test_shapes_that_do_not_fit_are_refused(implementation, rows, weights, groups):
    rows, weights = jnp.zeros(rows, "bfloat16"), jnp.zeros(weights, "bfloat16")
    message = r"given rows \(.*expected \[rows, D\], \[E, D, 64\] and \[E\]"
    with pytest.raises(ValueError, match=message):
        grouped_matmul(rows, weights, jnp.zeros(groups, jnp.int32), implementation=implementation)


@pytest.mark.parametrize("is_wide", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_matrix_product_has_the_same_bits_beside_any_rows(is_wide):
    """Whatever the tiles, which its number of rows decides; in float32 from a transposed matrix."""
    skip_unless_runnable("mosaic")
    rng = np.random.default_rng(0)
    rows, weights = (jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((150, 128), (128, 192)))
    asked = dict(interpret=INTERPRET)
    if is_wide:
        weights, asked = weights.T, asked | dict(is_transposed=True, dtype=jnp.float32)
    found = matmul(rows, weights, **asked)
    exact = np.asarray(rows, np.float64) @ np.asarray(weights.T if is_wide else weights, np.float64)
    assert_norm_close(found, exact, 1e-6 if is_wide else 4e-3)
    np.testing.assert_array_equal(matmul(rows[37:40], weights, **asked), found[37:40])
    for blocks in () if is_wide else (H200, *NARROW):
        operands = (rows,), (weights[None],), jnp.full(1, 150, jnp.int32)
        other = pallas.forward(*operands, is_transposed=False, blocks=blocks, **asked)
        np.testing.assert_array_equal(other, found)
