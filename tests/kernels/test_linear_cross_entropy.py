"""Every backend of the linear cross-entropy against float64.

The GPU kernel is interpreted where there is no GPU.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels.linear_cross_entropy import api
from jaxscale.kernels.linear_cross_entropy.api import BACKENDS, label_and_normaliser, refusal
from tests.kernels.interpretation import (
    assert_norm_close,
    assert_same_bits,
    but_triton,
    in_a_manual_region,
    interpret_of,
    lower_for_gpu,
    pairs,
    skip_unless_runnable,
)

# T, D, V.
SHAPES = {
    "edges": (133, 70, 300),  # no multiple of a block's rows, steps or columns
    "one_tile": (128, 64, 256),
    "odd_vocabulary": (64, 128, 523),  # several tiles of columns, several steps
}
TOLERANCE = 4e-3  # of the norm: gradients in bfloat16, made from logits' gradients in bfloat16


@pytest.fixture(params=but_triton(BACKENDS))
def run(request):
    """Results and gradients by a backend."""
    skip_unless_runnable(request.param)
    settings = dict(implementation=request.param, interpret=interpret_of(request.param))
    operation = functools.partial(label_and_normaliser, **settings)
    f = functools.partial(results_and_gradients, operation)
    # An interpreted kernel is run call by call, the twin as one program.
    return jax.jit(f) if request.param == "reference" else f


def draw(shape, dtype="bfloat16", size=1.0):
    """Hidden states, head, labels (two outside the vocabulary) and cotangents.

    Logits are of about 8 times `size`.
    """
    length, depth, vocabulary = shape
    keys = jax.random.split(jax.random.key(vocabulary), 5)
    h = jax.random.normal(keys[0], (length, depth)).astype(dtype)
    head = jax.random.normal(keys[1], (vocabulary, depth)) * size
    labels = jax.random.randint(keys[2], (length,), 0, vocabulary)
    labels = labels.at[3].set(-100).at[5].set(vocabulary)
    cotangents = (jax.random.normal(key, (length,)) for key in keys[3:])
    return h, head.astype(dtype), labels, *cotangents


def naive(h, head, labels, dlabel, dnormaliser):
    """Both results and both gradients in float64."""
    h, head = np.asarray(h, np.float64), np.asarray(head, np.float64)
    dlabel, dnormaliser = np.asarray(dlabel, np.float64), np.asarray(dnormaliser, np.float64)
    logits = h @ head.T
    top = logits.max(-1, keepdims=True)
    normaliser = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
    one_hot = np.arange(len(head)) == np.asarray(labels)[:, None]
    p = np.exp(logits - normaliser[:, None])
    dlogits = p * dnormaliser[:, None] + one_hot * dlabel[:, None]
    label = (logits * one_hot).sum(-1)
    return label, normaliser, dlogits @ head, dlogits.T @ h


def results_and_gradients(operation, h, head, labels, dlabel, dnormaliser, *bias):
    def loss(h, head, *bias):
        return operation(h, head, labels, *bias)

    results, pullback = jax.vjp(loss, h, head, *bias)
    return *results, *pullback((dlabel, dnormaliser))


def assert_results_and_gradients(found, wanted, tolerance):
    for got, want in zip(found[:2], wanted[:2], strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-5, atol=1e-5)
    for got, want in zip(found[2:], wanted[2:], strict=True):
        assert_norm_close(got, want, tolerance)


@pytest.mark.parametrize(("run", "shape"), pairs(BACKENDS, SHAPES, "edges"), indirect=["run"])
def test_results_and_gradients_are_those_of_float64(run, shape):
    arguments = draw(SHAPES[shape])
    assert_results_and_gradients(run(*arguments), naive(*arguments), TOLERANCE)


def test_float16(run):
    arguments = draw(SHAPES["one_tile"], "float16", 0.1)
    assert_results_and_gradients(run(*arguments), naive(*arguments), TOLERANCE / 8)


def test_probabilities_of_large_logits_are_as_exact_as_bfloat16(run):
    """A logit of 300 kept in bfloat16 would be off by 1, and its probability by a factor of 3."""
    arguments = draw(SHAPES["one_tile"], size=12.0)
    wanted = naive(*arguments)
    _, normaliser, _, _ = wanted
    assert normaliser.max() > 300
    assert_results_and_gradients(run(*arguments), wanted, TOLERANCE)


def test_twice_the_same_bits(run):
    arguments = draw(SHAPES["edges"])
    assert_same_bits(run(*arguments), run(*arguments))


@pytest.mark.parametrize("shape", ["edges", "one_tile"])
def test_a_bias_is_added_to_the_logits_and_has_its_gradient(run, shape):
    """As float64 has it with the bias in one more column, of which `h` has ones."""
    h, head, labels, *cotangents = draw(SHAPES[shape])
    bias = 3 * jax.random.normal(jax.random.key(1), head.shape[:1])
    wide = (np.concatenate([x, y[:, None]], -1) for x, y in ((h, np.ones(len(h))), (head, bias)))
    wide_h, wide_head = (np.asarray(x, np.float64) for x in wide)
    *wanted, dh, dhead = naive(wide_h, wide_head, labels, *cotangents)
    wanted += [dh[:, :-1], dhead[:, :-1], dhead[:, -1]]
    assert_results_and_gradients(run(h, head, labels, *cotangents, bias), wanted, TOLERANCE)


# Rows of zeros that fill the last tile are multiplied too, and nobody reads what comes out.
rows_beyond_the_end = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")


def forbidding(vocabulary, lowest=-np.inf):
    """A bias that allows the words of some columns, and whether it does: of no kernel's first tile.

    Of the last tile it allows none either.
    """
    bias = 3 * jax.random.normal(jax.random.key(1), (vocabulary,))
    word = np.arange(vocabulary)
    is_allowed = (word >= 256) & (word < 512) & (word % 7 > 0)
    return jnp.where(is_allowed, bias, lowest), is_allowed


def without_forbidden_words(h, head, labels, dlabel, dnormaliser, bias, is_allowed):
    """As `naive` has it of a head that has the allowed words alone; the bias's gradient is last."""
    ones = np.ones(len(h))[:, None]
    wide_h, wide_head = (
        np.concatenate([np.asarray(x, np.float64), y], -1)
        for x, y in ((h, ones), (head, np.asarray(bias)[:, None]))
    )
    number = np.where(is_allowed, np.cumsum(is_allowed) - 1, -1)
    known = np.clip(labels, 0, len(head) - 1)
    is_known = (np.asarray(labels) == known) & is_allowed[known]
    own = np.where(is_known, number[known], -1)
    label, normaliser, dh, of_allowed = naive(
        wide_h, wide_head[is_allowed], own, dlabel, dnormaliser
    )
    dhead = np.zeros(wide_head.shape)
    dhead[is_allowed] = of_allowed
    label[np.asarray(labels) == known] = (wide_h * wide_head[known]).sum(-1)[labels == known]
    return label, normaliser, dh[:, :-1], dhead[:, :-1], dhead[:, -1]


@rows_beyond_the_end
@pytest.mark.parametrize(
    ("dtype", "lowest"),
    [
        ("bfloat16", -np.inf),
        ("bfloat16", np.finfo("float32").min),
        ("float16", -np.inf),
        ("float16", -1e9),
    ],
)
def test_a_forbidden_word_is_as_if_it_were_not_there(run, dtype, lowest):
    """Also in tiles without an allowed word; two labels are forbidden, and count for nobody."""
    h, head, labels, *cotangents = draw(SHAPES["odd_vocabulary"], dtype, 0.1)
    bias, is_allowed = forbidding(len(head), lowest)
    allowed = np.flatnonzero(is_allowed)
    own = jnp.asarray(allowed)[labels % len(allowed)]
    labels = jnp.where((labels >= 0) & (labels < len(head)), own, labels)
    if np.isinf(lowest):
        labels = labels.at[8].set(0).at[9].set(520)
    wanted = without_forbidden_words(h, head, labels, *cotangents, bias, is_allowed)
    found = run(h, head, labels, *cotangents, bias)
    assert_results_and_gradients(found, wanted, TOLERANCE)
    *_, dhead, dbias = found
    assert not np.asarray(dhead)[~is_allowed].any()
    assert not np.asarray(dbias)[~is_allowed].any()
    if np.isinf(lowest):
        assert (np.asarray(found[0])[8:10] == -np.inf).all()


def test_with_every_word_forbidden_nothing_is_nan(run):
    h, head, labels, *cotangents = draw(SHAPES["one_tile"])
    bias = jnp.full(len(head), -jnp.inf)
    label, normaliser, *gradients = run(h, head, labels, *cotangents, bias)
    is_known = (labels >= 0) & (labels < len(head))
    np.testing.assert_array_equal(label, np.where(is_known, -np.inf, 0))
    np.testing.assert_array_equal(normaliser, np.full(len(h), -np.inf))
    for gradient in gradients:
        np.testing.assert_array_equal(np.asarray(gradient, np.float32), 0)


def test_gradients_of_a_head_with_a_bias_are_matmuls_of_aligned_rows():
    """With the bias in columns of the operands XLA would multiply rows of D + 3 numbers."""
    h, head, labels, *cotangents = jax.eval_shape(lambda: draw((128, 64, 256)))
    bias = jax.ShapeDtypeStruct(head.shape[:1], "float32")
    operation = functools.partial(label_and_normaliser, implementation="mosaic")
    run = functools.partial(results_and_gradients, operation)
    lowered = lower_for_gpu(run, h, head, labels, *cotangents, bias)
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) == 3, "the label's, and two gradients"
    assert not any("67" in re.findall(r"[x<](\d+)(?=x)", line) for line in products)


def test_a_kernel_is_given_rows_of_whole_units_with_a_bias_too(monkeypatch):
    """Triton would read rows of D + 3 numbers as they are, none of them aligned."""
    given = []

    def exponentials(h, head, interpret):
        given.append((h.shape, head.shape))
        tiles = jnp.zeros((1, len(h)))
        return jnp.zeros((len(h), len(head)), h.dtype), tiles, tiles

    monkeypatch.setattr(api, "_kernel", lambda implementation: (exponentials, 256))
    h, head, labels, *_ = draw((8, 64, 256))
    label_and_normaliser(h, head, labels, jnp.zeros(256), implementation="mosaic")
    assert given == [((8, 128), (256, 128))]


@pytest.mark.parametrize("implementation", BACKENDS)
def test_inside_a_manual_region_under_scan_and_remat(implementation):
    operation = functools.partial(label_and_normaliser, implementation=implementation)

    def through_a_scan(h, head, labels):
        one = jax.checkpoint(lambda labels: operation(h, head, labels))
        _, results = jax.lax.scan(lambda _, labels: (None, one(labels)), None, labels[None])
        return jax.tree.map(lambda x: x[0], results)

    drawn = draw(SHAPES["one_tile"])
    run = functools.partial(results_and_gradients, through_a_scan)
    found = in_a_manual_region(run, drawn, implementation)
    if found is not None:
        assert_results_and_gradients(
            found, [np.concatenate([x, x]) for x in naive(*drawn)], TOLERANCE
        )


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1024, 256, 16032)], ids=str)
def test_every_shape_can_be_compiled_for_a_gpu(shape):
    """Copies to and from memory want whole tiles, of which interpretation knows nothing."""
    operation = functools.partial(label_and_normaliser, implementation="mosaic")
    arguments = jax.eval_shape(lambda: draw(shape))
    run = functools.partial(results_and_gradients, operation)
    assert "mosaic_gpu" in lower_for_gpu(run, *arguments)


@pytest.mark.parametrize(
    ("h", "head"),
    [
        (((8, 64), "float32"), ((16, 64), "float32")),
        (((8, 64), "bfloat16"), ((16, 64), "float16")),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(h, head):
    message = "both bfloat16 or both float16"
    h, head = jnp.zeros(*h), jnp.zeros(*head)
    assert message in refusal("mosaic", h, head)
    with pytest.raises(ValueError, match=message):
        label_and_normaliser(h, head, jnp.zeros(8, jnp.int32), implementation="mosaic")


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(
    ("h", "head", "labels"),
    [((8, 64), (16, 32), (8,)), ((8, 64), (16, 64), (7,))],
)
def test_shapes_that_do_not_fit_are_refused(implementation, h, head, labels):
    h, head = jnp.zeros(h, "bfloat16"), jnp.zeros(head, "bfloat16")
    labels = jnp.zeros(labels, jnp.int32)
    with pytest.raises(ValueError, match=r"expected \[T, D\], \[V, D\] and \[T\]"):
        label_and_normaliser(h, head, labels, implementation=implementation)


@pytest.mark.parametrize("bias", [((15,), "float32"), ((16,), "bfloat16")])
def test_a_bias_that_does_not_fit_is_refused(bias):
    h, head, labels = jnp.zeros((8, 64)), jnp.zeros((16, 64)), jnp.zeros(8, jnp.int32)
    with pytest.raises(ValueError, match=r"expected \[V\] float32 and \[V, D\]"):
        label_and_normaliser(h, head, labels, jnp.zeros(*bias), implementation="reference")
