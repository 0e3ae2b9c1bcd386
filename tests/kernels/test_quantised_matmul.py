"""Products with integers of 4 and 8 bits: every backend against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.quantised_matmul import packing
from jaxscale.kernels.quantised_matmul.api import BACKENDS, MAX_ROWS, Norm, matmul
from tests.kernels.interpretation import INTERPRET, assert_norm_close, long_but, lower_for_gpu

IS_NEW = jax.__version_info__ >= (0, 11)
TOLERANCE = 4e-3  # of the norm, in bfloat16
# bits, K, N of each matrix, M
CASES = {
    "one token, two matrices": (4, 256, (128, 64), 1),
    "8 bits, nine tokens": (8, 384, (64,), 9),
    "more steps than are ahead": (4, 1280, (64,), 8),
    "as Phi-3-mini": (4, 3072, (3072, 3072), 1),
}


def draw(case):
    """(x, matrices, the results in float64)."""
    bits, depth, widths, rows = CASES[case]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, depth)), jnp.bfloat16)
    matrices, wanted = [], []
    for width in widths:
        integers = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (depth, width))
        scales = rng.uniform(0.5, 1.5, (width // 64, depth // 128, 64))
        scales = jnp.asarray(scales, jnp.bfloat16)
        matrices.append((packing.pack(jnp.asarray(integers), bits), scales))
        by_input = np.repeat(np.asarray(scales, np.float64), 128, axis=1)
        factors = by_input.transpose(1, 0, 2).reshape(depth, width)
        wanted.append(np.asarray(x, np.float64) @ (integers * factors))
    return x, matrices, wanted


@pytest.mark.parametrize(
    "case", long_but(CASES, ("one token, two matrices", "8 bits, nine tokens"))
)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_products_are_those_of_float64(case, implementation):
    if implementation == "mosaic" and not IS_NEW:
        pytest.skip("the kernel is for jax 0.11")
    x, matrices, wanted = draw(case)
    found = matmul(x, matrices, implementation=implementation, interpret=INTERPRET)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == x.dtype
        assert_norm_close(got, want, TOLERANCE)


@pytest.mark.parametrize(
    "around", ["norm and residual", pytest.param("norm and gate", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_what_is_around_a_product_is_that_of_float64(around, implementation):
    if implementation == "mosaic" and not IS_NEW:
        pytest.skip("the kernel is for jax 0.11")
    rng = np.random.default_rng(3)
    is_gated = around == "norm and gate"
    matrices, wholes = [], []
    for _ in range(1 + is_gated):
        integers = rng.integers(-8, 8, (256, 64))
        matrices.append((packing.pack(jnp.asarray(integers), 4), jnp.full((1, 2, 64), 2**-6)))
        wholes.append(integers / 64)
    x, residual = (jnp.asarray(rng.normal(size=(2, n)), jnp.bfloat16) for n in (256, 64))
    scale = jnp.asarray(rng.uniform(0.5, 1.5, 256), jnp.bfloat16)
    settings = dict(is_gated=True) if is_gated else dict(residual=residual)
    (got,) = matmul(
        x,
        matrices,
        norm=Norm(scale, 1e-5),
        dtype="float32",
        implementation=implementation,
        interpret=INTERPRET,
        **settings,
    )
    wide = np.asarray(x, np.float64)
    h = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * np.asarray(scale, np.float64)
    outputs = [h @ whole for whole in wholes]
    if is_gated:
        wanted = outputs[0] / (1 + np.exp(-outputs[0])) * outputs[1]
    else:
        wanted = outputs[0] + np.asarray(residual, np.float64)
    assert_norm_close(got, wanted, TOLERANCE)


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_gives_what_was_packed(bits):
    integers = np.random.default_rng(1).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (256, 128))
    words = packing.pack(jnp.asarray(integers), bits)
    assert words.nbytes == integers.size * bits // 8
    np.testing.assert_array_equal(packing.unpack(words), integers)
    outputs = jnp.asarray([127, 0, 65])
    np.testing.assert_array_equal(packing.look_up(words, outputs), integers[:, outputs].T)


@pytest.mark.skipif(not IS_NEW, reason="the kernel is for jax 0.11")
def test_it_lowers_for_a_gpu():
    x, matrices, _ = draw("8 bits, nine tokens")
    assert "mosaic" in lower_for_gpu(lambda x: matmul(x, matrices, implementation="mosaic"), x)


@pytest.mark.parametrize(
    "rows, dtype, expected",
    [(1, "float32", "x of bfloat16"), (MAX_ROWS + 1, "bfloat16", f"at most {MAX_ROWS} rows")],
)
def test_what_the_kernel_cannot_do_is_refused(rows, dtype, expected):
    _, matrices, _ = draw("8 bits, nine tokens")
    with pytest.raises(ValueError, match=expected):
        matmul(jnp.zeros((rows, 384), dtype), matrices, implementation="mosaic")
    nine = jnp.zeros((9, 384), jnp.bfloat16)
    with pytest.raises(ValueError, match="at most 8 rows"):
        matmul(nine, matrices, residual=nine[:, :64], implementation="mosaic")
    with pytest.raises(ValueError, match="words"):
        matmul(jnp.zeros((1, 256), jnp.bfloat16), matrices, implementation="reference")
