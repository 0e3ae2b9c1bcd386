"""The chunked cross-entropy against logits of all tokens at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.kernels import device
from jaxscale.ops import loss as losses
from jaxscale.ops.loss import Head, loss_of_logits, project, sum_over_chunks, token_loss
from jaxscale.types import InputError

B, T, D, V = 2, 12, 8, 20


def make(dtype="float32"):
    rng = np.random.default_rng(0)
    x, head = (
        jnp.asarray(rng.normal(size=(B, T, D)), dtype),
        jnp.asarray(rng.normal(size=(V, D)), dtype),
    )
    labels = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32).at[1].set(0)
    return x, head, labels, weights


def loss(x, head, labels, weights):
    nll, normaliser = token_loss(x, head, labels)
    return ((nll + 0.1 * normaliser**2) * weights).sum(), (nll * weights).sum(), weights.sum()


def plain(x, head, labels, weights):
    """Softmax written out: no log-sum-exp, no chunk, no custom gradient."""
    logits = jnp.einsum("btd,vd->btv", x, head)
    normaliser = jnp.log(jnp.exp(logits).sum(-1))
    nll = normaliser - (logits * jax.nn.one_hot(labels, V)).sum(-1)
    return ((nll + 0.1 * normaliser**2) * weights).sum(), (nll * weights).sum(), weights.sum()


@pytest.mark.parametrize("num_chunks", [1, 3, 12])
def test_value_and_gradient_equal_the_plain_loss(num_chunks):
    """With a cotangent other than 1, z-loss, masked tokens and a row without valid tokens."""
    x, head, labels, weights = make()

    def scaled(f):
        return jax.jit(
            jax.value_and_grad(
                lambda x, head: (-2.5 * f(x, head)[0], f(x, head)[1:]), (0, 1), has_aux=True
            )
        )

    (value, sums), gradients = scaled(
        lambda x, head: sum_over_chunks(loss, num_chunks, x, head, labels, weights)
    )(x, head)
    (wanted, wanted_sums), wanted_gradients = scaled(
        lambda x, head: plain(x, head, labels, weights)
    )(x, head)
    np.testing.assert_allclose((value, *sums), (wanted, *wanted_sums), rtol=1e-5)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert (gradients[0][1] == 0).all()


def test_a_bias_is_added_to_the_logits_and_gets_its_gradient():
    """As one more column of the head, and one of ones to multiply it, would give."""
    x, head, labels, weights = make()
    bias = jnp.asarray(np.random.default_rng(1).normal(size=V), jnp.float32)

    def wider(x, head, bias):
        wide = (
            jnp.concatenate([x, jnp.ones((B, T, 1))], -1),
            jnp.concatenate([head, bias[:, None]], -1),
        )
        return plain(*wide, labels, weights)[0]

    def ours(x, head, bias):
        return sum_over_chunks(loss, 3, x, Head(head, bias), labels, weights)[0]

    got, wanted = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, head, bias) for f in (ours, wider))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, wanted)


@pytest.mark.parametrize("has_bias", [False, True])
def test_what_is_asked_of_our_kernel(has_bias, monkeypatch):
    """The same arguments, given to the kernel's slow twin, must give the same loss and gradient."""
    x, head, labels, weights = make("bfloat16")
    bias = jnp.asarray(np.random.default_rng(1).normal(size=V), jnp.float32)

    def run(x, head, bias):
        return sum_over_chunks(loss, 3, x, Head(head, bias) if has_bias else head, labels, weights)[
            0
        ]

    wanted = jax.jit(jax.value_and_grad(run, (0, 1, 2)))(
        x.astype("float32"), head.astype("float32"), bias
    )
    asked, call = [], losses.linear_cross_entropy.label_and_normaliser

    def twin(h, head, labels, bias, implementation):
        asked.append((implementation, head.shape, h.dtype.name, head.dtype.name))
        return call(h, head, labels, bias, implementation="reference")

    monkeypatch.setattr(device, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(losses.linear_cross_entropy, "label_and_normaliser", twin)
    value, gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2)))(x, head, bias)
    assert {*asked} == {("mosaic", (V, D), "bfloat16", "bfloat16")}
    np.testing.assert_allclose(value, wanted[0], rtol=1e-5)
    for got, want in zip(gradients, wanted[1], strict=True):
        got, want = (np.asarray(a, np.float64) for a in (got, want))
        assert np.linalg.norm(got - want) <= 4e-3 * np.linalg.norm(want)


def test_the_value_alone_equals_the_value_with_gradient():
    arguments = make()
    alone = sum_over_chunks(loss, 3, *arguments)
    with_gradient, _ = jax.vjp(lambda x: sum_over_chunks(loss, 3, x, *arguments[1:]), arguments[0])
    np.testing.assert_allclose(alone, with_gradient, rtol=1e-6)


def test_no_valid_token_gives_zero_and_no_nan():
    x, head, labels, weights = make()
    value, gradients = jax.value_and_grad(
        lambda x, head: sum_over_chunks(loss, 3, x, head, labels, 0 * weights)[0], (0, 1)
    )(x, head)
    assert value == 0
    assert all((g == 0).all() for g in gradients)


def test_the_gradient_of_the_head_adds_up_chunks_in_float32():
    """256 and 128 times 1/64: each term would be lost in bfloat16, whose step there is 2."""

    def pick(x, head, labels, weights):
        return ((x @ head.T)[..., 0].astype(jnp.float32) * weights).sum()

    x = jnp.ones((1, 129, 1), jnp.bfloat16)
    weights = jnp.full((1, 129), 2.0**-6).at[0, 0].set(256.0)
    head, labels = jnp.ones((1, 1), jnp.bfloat16), jnp.zeros((1, 129), jnp.int32)
    gradient = jax.grad(lambda head: sum_over_chunks(pick, 129, x, head, labels, weights))(head)
    assert gradient.dtype == jnp.bfloat16
    assert gradient == 258


@pytest.mark.parametrize("label", [-100, -1, V, 99])
def test_a_label_outside_the_vocabulary_has_no_loss_and_no_gradient(label):
    x, head, labels, _ = make()
    outside, weights, fewer = np.array(labels), np.ones((B, T), np.float32), np.ones((B, T))
    outside[0, 3] = outside[1, 5] = label
    weights[0, 3] = fewer[0, 3] = fewer[1, 5] = 0

    @jax.jit
    @jax.value_and_grad
    def nll(x, labels, weights):
        return (token_loss(x, head, labels)[0] * weights).sum()

    wanted, got = nll(x, labels, fewer.astype("float32")), nll(x, outside, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, wanted)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_forbidden_word_is_as_if_it_were_not_there(softcap):
    """With z-loss and tokens of weight 0, of which one has a forbidden label."""
    x, head, labels, weights = make()
    bias = jnp.asarray(np.random.default_rng(1).normal(size=V), jnp.float32)
    allowed = np.arange(5, V, 2)

    def sums(x, head, labels):
        def of_chunk(x, head, labels, weights):
            nll, normaliser = token_loss(x, head, labels, softcap)
            nll, normaliser = (jnp.where(weights == 0, 0, each) for each in (nll, normaliser))
            return ((nll + 0.1 * normaliser**2) * weights).sum()

        return sum_over_chunks(of_chunk, 3, x, head, labels, weights)

    def whole(x, head, bias):
        own = jnp.asarray(allowed)[labels % len(allowed)].at[0, 0].set(0)
        return sums(x, Head(head, bias), own)

    def part(x, head, bias):
        return sums(x, Head(head[allowed], bias[allowed]), labels % len(allowed))

    weights = weights.at[0, 0].set(0)
    forbidding = jnp.full(V, -jnp.inf).at[allowed].set(bias[allowed])
    got = jax.jit(jax.value_and_grad(whole, (0, 1, 2)))(x, head, forbidding)
    wanted = jax.jit(jax.value_and_grad(part, (0, 1, 2)))(x, head, bias)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, wanted)


def test_a_forbidden_label_has_an_infinite_loss_and_no_gradient():
    x, head, labels, _ = make()
    bias = np.where(np.arange(V) == 3, -np.inf, 0).astype("float32")
    labels = np.where(labels == 3, 4, labels)
    labels[0, 5] = 3
    others = np.ones(labels.shape, np.float32)
    others[0, 5] = 0

    @jax.jit
    def run(x, head, bias, weights):
        value, pullback = jax.vjp(
            lambda *a: token_loss(a[0], Head(*a[1:]), labels)[0], x, head, bias
        )
        return value, pullback(weights)

    value, gradients = run(x, head, bias, np.ones_like(others))
    assert value[0, 5] == np.inf
    assert np.isfinite(value[others == 1]).all()
    _, wanted = run(x, head, bias, others)
    jax.tree.map(np.testing.assert_array_equal, gradients, wanted)
    assert all(np.isfinite(each).all() for each in gradients)


def test_logits_that_are_all_forbidden_have_no_gradient():
    """A row of a mask of one's own, beside others."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, V)))
    logits = logits.at[0, 1].set(-jnp.inf).at[0, 2, ::2].set(-jnp.inf)
    labels = jnp.asarray([[3, 4, 5]])

    @jax.jit
    def both(logits):
        results, pullback = jax.vjp(lambda x: loss_of_logits(x, labels), logits)
        return results, *pullback((jnp.ones((1, 3)), jnp.ones((1, 3))))

    (nll, normaliser), gradient = jax.tree.map(np.asarray, both(logits))
    assert (nll[0, 1], normaliser[0, 1]) == (np.inf, -np.inf)
    wanted = 2 * jax.nn.softmax(logits[0, ::2]) - jax.nn.one_hot(labels[0, ::2], V)
    np.testing.assert_allclose(gradient[0, ::2], wanted, atol=1e-6)
    assert (gradient[0, 1] == 0).all()


def test_projection_is_rounded_neither_in_the_logits_nor_wider_in_the_gradient():
    x, head, *_ = make("bfloat16")
    logits, pullback = jax.vjp(project, x, head)
    wanted = jnp.einsum("btd,vd->btv", x.astype("float32"), head.astype("float32"))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)
    traced = str(jax.make_jaxpr(pullback)(logits))
    assert traced.count("dot_general") == traced.count("preferred_element_type=bfloat16") == 2


def test_large_logits_do_not_overflow():
    x = np.array([[[1e4, 0.0], [0.0, 1e4]]], np.float32)
    nll, normaliser = jax.jit(token_loss)(x, np.eye(2, dtype=np.float32), np.array([[0, 0]]))
    np.testing.assert_allclose(nll, [[0, 1e4]])
    np.testing.assert_allclose(normaliser, [[1e4, 1e4]])


def test_the_backward_keeps_no_logits():
    x, head, labels, weights = make()
    _, pullback = jax.vjp(
        lambda x, head: sum_over_chunks(loss, 3, x, head, labels, weights)[0], x, head
    )
    assert V not in {
        dim for leaf in jax.tree.leaves(pullback) for dim in leaf.shape[:-1] if leaf.ndim == 3
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(pullback)) <= x.size + head.size


def test_chunks_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match=r"T % num_loss_chunks == 0, but T = 12"):
        sum_over_chunks(loss, 5, *make())
