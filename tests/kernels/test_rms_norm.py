"""Every backend of the norm beside its residual against float64.

The GPU kernel is interpreted where there is no GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxscale.kernels.rms_norm.api import BACKENDS, refusal, residual_norm
from tests.kernels.interpretation import (
    INTERPRET,
    assert_norm_close,
    assert_same_bits,
    but_triton,
    interpret_of,
    lower_for_gpu,
    pairs,
    skip_unless_runnable,
)

EPSILON = 1e-3
# A thread loads 1, 2, 4 and 8 elements at a time.
SHAPES = {
    "one_row": (1, 128),
    "fewer_rows_than_stages": (3, 256),
    "odd_rows": (7, 384),
    "fours": (4, 512),
    "eights": (5, 1024),
}
IS_OLD = jax.__version_info__ < (0, 11)
OLD_REASON = (
    "our kernel refuses jax 0.10, which cannot load a part of a reference in a given layout"
)
TOLERANCE = 4e-3  # of the norm: results in bfloat16
LARGEST = 0.05  # root mean square of a row, whose square is next to EPSILON


def by_backend(implementation):
    """Results and gradients: an interpreted kernel is run call by call, the twin as one program."""
    settings = dict(implementation=implementation, interpret=interpret_of(implementation))
    f = functools.partial(results_and_gradients, functools.partial(residual_norm, **settings))
    return jax.jit(f) if implementation == "reference" else f


@pytest.fixture(params=but_triton(BACKENDS))
def run(request):
    if request.param == "mosaic" and IS_OLD:
        pytest.skip(OLD_REASON)
    skip_unless_runnable(request.param)
    return by_backend(request.param)


def draw(shape, dtype="bfloat16"):
    """Input with rows of unlike size, scale in float32, cotangents of the input and of its norm."""
    num_rows, width = shape
    keys = jax.random.split(jax.random.key(width), 4)
    size = LARGEST * jnp.arange(1, num_rows + 1)[:, None] / num_rows
    x, dx, dy = (jax.random.normal(key, shape) for key in keys[:3])
    scale = jax.random.normal(keys[3], (width,))
    return (x * size).astype(dtype), scale, dx.astype(dtype), dy.astype(dtype)


def naive(x, scale, dx, dy):
    """Both results and both gradients in float64."""
    x, scale, dx, dy = (np.asarray(a, np.float64) for a in (x, scale, dx, dy))
    inverse = (np.square(x).mean(-1, keepdims=True) + EPSILON) ** -0.5
    slope = (dy * scale * x).mean(-1, keepdims=True)
    dx_total = dx + dy * scale * inverse - x * slope * inverse**3
    dscale = (dy * x * inverse).sum(0)
    return x, x * inverse * scale, dx_total, dscale


def results_and_gradients(operation, x, scale, dx, dy):
    both, pullback = jax.vjp(functools.partial(operation, epsilon=EPSILON), x, scale)
    return *both, *pullback((dx, dy))


def assert_results_and_gradients(found, wanted, tolerance):
    for got, want in zip(found, wanted, strict=True):
        assert_norm_close(got, want, tolerance)


@pytest.mark.parametrize(("run", "shape"), pairs(BACKENDS, SHAPES, "odd_rows"), indirect=["run"])
def test_results_and_gradients_are_those_of_float64(run, shape):
    arguments = draw(SHAPES[shape])
    found = run(*arguments)
    assert [a.dtype for a in found] == ["bfloat16"] * 3 + ["float32"]
    assert_results_and_gradients(found, naive(*arguments), TOLERANCE)


def test_float16(run):
    arguments = draw(SHAPES["odd_rows"], "float16")
    assert_results_and_gradients(run(*arguments), naive(*arguments), TOLERANCE / 8)


def test_twice_the_same_bits(run):
    arguments = draw(SHAPES["odd_rows"])
    assert_same_bits(run(*arguments), run(*arguments))


@pytest.mark.parametrize("run", ["mosaic", "triton"], indirect=True)
def test_the_sum_of_both_gradients_is_rounded_once(run):
    """Two rounded parts that cancel but for a bit would leave a wrong one.

    The kernel adds before it rounds.
    """
    x, scale, _, dy = draw(SHAPES["odd_rows"])
    no_dx = np.zeros_like(dy, np.float64)
    _, _, alone, _ = naive(x, scale, no_dx, dy)
    arguments = x, scale, jnp.asarray(-alone, "bfloat16"), dy
    _, _, got, _ = run(*arguments)
    _, _, want, _ = naive(*arguments)
    assert_norm_close(got, want, TOLERANCE)


@pytest.mark.skipif(IS_OLD, reason=OLD_REASON)
def test_inside_a_manual_region_under_scan_and_remat():
    """Interpretation knows neither, so on a CPU the kernel is only lowered for GPUs."""

    def through_a_scan(x, scale, *, epsilon):
        operation = functools.partial(residual_norm, epsilon=epsilon, implementation="mosaic")
        one = jax.checkpoint(operation)
        results, _ = jax.lax.scan(lambda carry, _: (one(carry[0], scale), None), (x, x), length=1)
        return results

    def all_but_dscale(*arguments):
        return results_and_gradients(through_a_scan, *arguments)[:3]

    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    by_row, whole = PartitionSpec("data"), PartitionSpec()
    local = jax.shard_map(
        all_but_dscale,
        mesh=mesh,
        in_specs=(by_row, whole, by_row, by_row),
        out_specs=by_row,
        check_vma=False,
    )
    arguments = draw((6, 384))
    assert "mosaic_gpu" in lower_for_gpu(local, *arguments)
    if INTERPRET is False:
        assert_results_and_gradients(jax.jit(local)(*arguments), naive(*arguments)[:3], TOLERANCE)


@pytest.mark.skipif(IS_OLD, reason=OLD_REASON)
@pytest.mark.parametrize(
    "shape",
    [*SHAPES.values(), (16384, 2048), (100, 3072), (8192, 4096)],
    ids=str,
)
def test_every_shape_can_be_compiled_for_a_gpu(shape):
    """Copies to shared memory want dims that interpretation does not ask for."""
    operation = functools.partial(residual_norm, implementation="mosaic")
    arguments = jax.eval_shape(lambda: draw(shape))
    run = functools.partial(results_and_gradients, operation)
    assert "mosaic_gpu" in lower_for_gpu(run, *arguments)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((4, 128), "float32", "x bfloat16 or float16, but it is float32"),
        ((0, 128), "bfloat16", "a row at least"),
        ((4, 192), "bfloat16", "but D = 192"),
        ((4, 8192), "bfloat16", "but D = 8192"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(shape, dtype, message):
    x, scale = jnp.zeros(shape, dtype), jnp.ones(shape[1:])
    assert message in refusal("mosaic", x)
    with pytest.raises(ValueError, match=message):
        residual_norm(x, scale, epsilon=EPSILON, implementation="mosaic")


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("x", "scale"), [((4, 128), (64,)), ((2, 4, 128), (128,))])
def test_shapes_that_do_not_fit_are_refused(implementation, x, scale):
    x, scale = jnp.zeros(x, "bfloat16"), jnp.ones(scale)
    with pytest.raises(ValueError, match=r"expected \[rows, D\] and \[D\]"):
        residual_norm(x, scale, epsilon=EPSILON, implementation=implementation)
