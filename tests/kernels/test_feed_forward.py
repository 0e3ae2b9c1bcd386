"""The feed-forward of experts against float64, and what becomes of rows that are no expert's.

The GPU kernel is interpreted where there is no GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxscale.kernels.grouped_matmul import pallas, swiglu
from jaxscale.kernels.grouped_matmul.api import BACKENDS, feed_forward
from jaxscale.kernels.grouped_matmul.pallas import ALIGNMENT, cover
from jaxscale.kernels.grouped_matmul.swiglu import backward, backward_of_some
from jaxscale.kernels.persistent import TILE_ROWS
from jaxscale.ops import moe
from jaxscale.parallel import expert
from jaxscale.parallel.mesh import EXPERT, MeshConfig, make_mesh
from tests.kernels.interpretation import (
    assert_norm_close,
    assert_same_bits,
    but_triton,
    interpret_of,
    skip_unless_runnable,
)
from tests.kernels.test_grouped_matmul import CASES, DEPTH, ROWS, TOLERANCE, compiled_twin


@pytest.fixture(params=BACKENDS)
def implementation(request):
    skip_unless_runnable(request.param)
    return request.param


def test_a_feed_forward_whose_matrices_do_not_fit_and_an_unknown_backend_are_refused():
    rows = jnp.zeros((8, 64), "bfloat16")
    up = jnp.zeros((2, 64, 128), "bfloat16")
    sizes = jnp.zeros(2, jnp.int32)
    down = up.swapaxes(1, 2)
    for gate, of_down in ((up[..., :64], down), (up, down[:, :64])):
        with pytest.raises(ValueError, match=r"feed_forward: given rows .*\[E, D, 128\]"):
            feed_forward(rows, gate, up, of_down, sizes, implementation="xla")
    with pytest.raises(ValueError, match="given implementation 'cuda', expected one of"):
        feed_forward(rows, up, up, down, sizes, implementation="cuda")


def naive_feed_forward(x, weights, group_sizes):
    """float64, differentiated by JAX."""
    ends = np.cumsum(group_sizes)
    group_of_row = np.searchsorted(ends, np.arange(len(x)), side="right")
    # Rows past the last group get matrices of zeros.
    padded = (jnp.concatenate([w, jnp.zeros_like(w[:1])]) for w in weights)
    gate, up, down = (w[group_of_row] for w in padded)
    g = jnp.einsum("rd,rdf->rf", x, gate)
    u = jnp.einsum("rd,rdf->rf", x, up)
    return jnp.einsum("rf,rfd->rd", g * jax.nn.sigmoid(g) * u, down)


def draw_feed_forward(case, dtype="bfloat16"):
    """x, the cotangent and the matrices.

    F is no multiple of half a block, which holds the gate, nor of a tile.
    """
    num_experts, width = len(CASES[case]), 180
    wide, narrow = (num_experts, DEPTH, width), (num_experts, width, DEPTH)
    shapes = (ROWS, DEPTH), (ROWS, DEPTH), wide, wide, narrow
    keys = jax.random.split(jax.random.key(1), len(shapes))
    arrays = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    x, cotangent, gate, up, down = (array.astype(dtype) for array in arrays)
    gate /= 8  # gates of about 1, where the slope of SwiGLU changes most
    weights = [gate, up, down]
    if dtype == "float16":
        weights = [w / 8 for w in weights]  # gradients stay far from the largest number
    return x, cotangent, *weights


def feed_forward_and_gradients(implementation, sizes, drawn):
    """The output without a backward, the output with one, and all gradients."""
    x, cotangent, *weights = drawn
    backend = dict(implementation=implementation, interpret=interpret_of(implementation))

    def run(x, *weights):
        return feed_forward(x, *weights, jnp.array(sizes, jnp.int32), **backend)

    def both(x, cotangent, *weights):
        y, pullback = jax.vjp(run, x, *weights)
        return run(x, *weights), y, *pullback(cotangent)

    return compiled_twin(both, implementation)(x, cotangent, *weights)


@pytest.mark.parametrize("implementation", but_triton(BACKENDS), indirect=True)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("one_row_each_and_a_rest", "bfloat16"),
        pytest.param("uneven_and_empty", "bfloat16", marks=pytest.mark.long),
        pytest.param("none", "bfloat16", marks=pytest.mark.long),
        pytest.param("all_in_one", "bfloat16", marks=pytest.mark.long),
        pytest.param("one_row_each_and_a_rest", "float16", marks=pytest.mark.long),
    ],
)
def test_feed_forward_and_its_gradients_are_those_of_float64(implementation, case, dtype):
    sizes, drawn = CASES[case], draw_feed_forward(case, dtype)

    @jax.jit
    def wanted(x, cotangent, *weights):
        y, pullback = jax.vjp(lambda x, *w: naive_feed_forward(x, w, sizes), x, *weights)
        return y, y, *pullback(cotangent)

    with jax.enable_x64(True):
        wide = [jnp.asarray(array, "float64") for array in drawn]
        want_all = [np.asarray(array) for array in wanted(*wide)]
    tolerance = 3 * TOLERANCE / (8 if dtype == "float16" else 1)
    got_all = feed_forward_and_gradients(implementation, sizes, drawn)
    for got, want in zip(got_all, want_all, strict=True):
        assert got.dtype == dtype
        assert_norm_close(got, want, tolerance)
        if got.shape == drawn[0].shape:
            assert not np.asarray(got[sum(sizes) :]).any(), "rows past the last group"


@pytest.mark.long
def test_a_tail_that_nobody_needs_changes_nothing_else(monkeypatch):
    """What a GPU leaves undefined is NaN here, and reaches neither groups nor matrices."""
    skip_unless_runnable("mosaic")
    sizes, num_rows = jnp.array([1, 40, 3], jnp.int32), 320
    used = int(sizes.sum())
    rng = np.random.default_rng(0)
    shapes = (num_rows, DEPTH), (num_rows, DEPTH), (3, DEPTH, 128), (3, DEPTH, 128), (3, 128, DEPTH)
    x, dy, *weights = (jnp.asarray(rng.normal(size=shape), "bfloat16") for shape in shapes)

    def leave(function):
        def left(*arguments, needs_tail, **settings):
            results = function(*arguments, needs_tail=needs_tail, **settings)
            end = used - used % ALIGNMENT + TILE_ROWS
            undefined = (jnp.arange(num_rows) >= end)[:, None] & (not needs_tail)
            return jax.tree.map(lambda y: jnp.where(undefined, jnp.nan, y), results)

        return left

    for module in (pallas, swiglu):
        monkeypatch.setattr(module, "forward", leave(module.forward))

    def run(needs_tail):
        settings = dict(implementation="mosaic", interpret=interpret_of("mosaic"))

        def f(x, *weights):
            return feed_forward(x, *weights, sizes, needs_tail=needs_tail, **settings)

        y, pullback = jax.vjp(f, x, *weights)
        dx, *dweights = pullback(dy)
        return y[:used], dx[:used], *dweights

    assert_same_bits(run(False), run(True))


def test_of_a_tail_that_nobody_needs_one_tile_is_covered():
    """A step of the weights' gradient reads no further."""
    table = cover(jnp.array([1, 40, 3]), 1024, False)
    _, first, begin, end = np.asarray(table[:, table[0] == 3]).T[0]
    assert (first + begin, first + end) == (44, 40 + TILE_ROWS)
    assert (table[3] > table[2]).sum() == 4, "a tile each"


@pytest.mark.parametrize("num_used", [0, 5, 200])
def test_the_backward_of_swiglu_of_the_rows_that_are_used(num_used):
    skip_unless_runnable("mosaic")
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = [3 * jax.random.normal(key, (200, 64), "bfloat16") for key in keys]
    with jax.enable_x64(True):
        wanted = backward(*(jnp.asarray(x, "float64") for x in drawn))
    got = backward_of_some(*drawn, jnp.int32(num_used), interpret=interpret_of("mosaic"))
    for some, whole in zip(got, wanted, strict=True):
        first = slice(min(num_used + TILE_ROWS, 200))
        assert_norm_close(some[first], whole[first], TOLERANCE)


@pytest.mark.long
def test_feed_forward_twice_the_same_bits(implementation):
    case = "one_row_each_and_a_rest"
    arguments = implementation, CASES[case], draw_feed_forward(case)
    once, again = (feed_forward_and_gradients(*arguments) for _ in range(2))
    assert_same_bits(once, again)


def test_a_gate_far_below_zero_has_a_gradient_of_zero():
    """exp(-g) is infinite there."""
    g = jnp.asarray([-80.0, -89.0, -1e4], jnp.bfloat16)
    value, gradient = jax.value_and_grad(lambda g: swiglu.swiglu(g, jnp.ones_like(g)).sum())(g)
    assert abs(value) < 1e-30
    assert (jnp.abs(gradient) < 1e-30).all()


def test_feed_forward_refuses_what_the_kernel_cannot_do():
    rows = jnp.zeros((8, 64), "bfloat16")
    up, down = jnp.zeros((2, 64, 64), "bfloat16"), jnp.zeros((2, 64, 64))
    message = "feed_forward: given 'mosaic', expected rows and weights both bfloat16"
    with pytest.raises(ValueError, match=message):
        feed_forward(rows, up, up, down, jnp.zeros(2, jnp.int32), implementation="mosaic")


NUM_TOKENS = 150
# Of each token two of four experts, of which this member has 0 and 1.
ROUTINGS = {
    "uneven": np.random.default_rng(0).permuted(np.tile(np.arange(4), (NUM_TOKENS, 1)), axis=1),
    "all_on_one": np.tile([0, 3], (NUM_TOKENS, 1)),
    "none_here": np.tile([2, 3], (NUM_TOKENS, 1)),
}


@pytest.mark.long
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_members_share_has_nothing_of_rows_that_the_kernels_leave_undefined(routing, monkeypatch):
    """They are NaN in interpretation; the member of an `expert` axis has room for all choices."""
    skip_unless_runnable("mosaic")
    interpreted = functools.partial(feed_forward, interpret=interpret_of("mosaic"))
    monkeypatch.setattr(moe.kernel, "feed_forward", interpreted)
    monkeypatch.setattr(moe, "kernel_for", lambda *_: "mosaic")
    index = jnp.asarray(ROUTINGS[routing][None, :, :2])
    rng = np.random.default_rng(1)
    shapes = {"up": (2, DEPTH, 128), "gate": (2, DEPTH, 128), "down": (2, 128, DEPTH)}
    weights = {name: jnp.asarray(rng.normal(size=s) / 8, "bfloat16") for name, s in shapes.items()}
    x, dy = (jnp.asarray(rng.normal(size=(1, NUM_TOKENS, DEPTH)), "bfloat16") for _ in range(2))
    gates = jnp.asarray(rng.uniform(size=index.shape), "float32")

    def differentiated(share):
        y, pullback = jax.vjp(share, x, gates, weights)
        return y, *pullback(dy)

    def share(x, gates, weights):
        return expert._share(x, index, gates, weights, "swiglu", None, None, EXPERT)

    def of_reference(x, gates, weights):
        is_here = index < 2
        here = jnp.where(is_here, index, 0), jnp.where(is_here, gates, 0)
        return moe.reference(x, *here, weights, "swiglu")

    alone = PartitionSpec()
    found = jax.shard_map(
        lambda: differentiated(share),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        in_specs=(),
        out_specs=alone,
        check_vma=False,
    )()
    wanted = differentiated(of_reference)
    for got, want in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert_norm_close(got, want, 3 * TOLERANCE)
