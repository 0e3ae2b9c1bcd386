"""Cross-entropy over a large vocabulary, without keeping its logits."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.linear_cross_entropy import api as linear_cross_entropy
from jaxscale.ops.device import kernel_for
from jaxscale.ops.linear import quantised_products
from jaxscale.ops.precision import accumulator
from jaxscale.ops.quantised import QuantisedTable
from jaxscale.types import Array, InputError

logger = logging.getLogger(__name__)


@jax.custom_vjp
def project(x: Array, head: Array) -> Array:
    """Logits in at least float32, as the matmul accumulates them.

    Rounded to bfloat16, the largest logit of one token in ten would be a tie. The gradient rounds
    the cotangent to the type of `x`: plainly differentiated, its two matmuls would run in float32.

    Args:
        x: [B, T, D].
        head: [V, D].
    Returns:
        [B, T, V].
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=wide)


def _project_forward(
    x: Array,
    head: Array,
) -> tuple[Array, tuple[Array, Array]]:
    return project(x, head), (x, head)


def _project_backward(
    residuals: tuple[Array, Array],
    cotangent: Array,
) -> tuple[Array, Array]:
    x, head = residuals
    cotangent = cotangent.astype(x.dtype)
    dx = jnp.einsum("btv,vd->btd", cotangent, head)
    dhead = jnp.einsum("btv,btd->vd", cotangent, x)
    return dx, dhead


project.defvjp(_project_forward, _project_backward)


class Head(NamedTuple):
    """An unembedding with a bias; one without is its matrix alone.

    Args:
        weights: [V, D].
        bias: [V], added in at least float32. -inf forbids a word, also behind a soft-cap: its
            probability and its gradients are 0, and the others' are as without it.
    """

    weights: Array
    bias: Array


def num_rows(head: Array | Head) -> int:
    """V, or the part of it that this device has."""
    return _matrix(head).shape[0]


def _matrix(head: Array | Head) -> Array:
    return head.weights if isinstance(head, Head) else head


def _total_over_tokens(x: Array) -> Array:
    return x.sum(-1)


def unembed(
    h: Array,
    head: Array | Head,
    softcap: float | None = None,
) -> Array:
    """Logits [B, T, V] of `project`, plus the bias if there is one.

    With a soft-cap c they become c * tanh(logits / c).
    """
    matrix = _matrix(head)
    if isinstance(matrix, QuantisedTable):
        (logits,) = quantised_products(h, [matrix.matrix], accumulator(h).dtype)
    else:
        logits = project(h, matrix)
    return biased_and_capped(logits, head, softcap)


def biased_and_capped(
    logits: Array,
    head: Array | Head,
    softcap: float | None,
) -> Array:
    """What `unembed` makes of products [..., V] with the head's matrix."""
    bias = accumulator(head.bias) if isinstance(head, Head) else None
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is None:
        return logits
    # A cap would allow a forbidden word again. As a constant its logit has no gradient.
    return jnp.where(bias == -jnp.inf, -jnp.inf, logits)


def token_loss(
    h: Array,
    head: Array | Head,
    labels: Array,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """Negative log-likelihood and log-normaliser of each token.

    The softmax is taken in at least float32.

    Args:
        h: [B, T, D].
        head: [V, D], or with a bias.
        labels: [B, T] int32; one outside [0, V), such as -100, has a loss of 0, and a forbidden
            word one of +inf, which has no gradient.
        softcap: as in `unembed`.
    Returns:
        (nll [B, T], log sum exp [B, T], which is -inf where all words are forbidden).
    """
    label, normaliser = label_and_normaliser(h, head, labels, softcap)
    return nll_of(label, normaliser, labels, num_rows(head)), normaliser


def nll_of(
    label: Array,
    normaliser: Array,
    labels: Array,
    num_words: int,
) -> Array:
    """`token_loss` of a label's logit and log sum exp, for labels of a whole vocabulary."""
    is_known = (labels >= 0) & (labels < num_words)
    nll = jnp.where(label == -jnp.inf, jnp.inf, normaliser - label)
    return jnp.where(is_known, nll, 0)


def loss_of_logits(
    logits: Array,
    labels: Array,
    total: Callable = _total_over_tokens,
) -> tuple[Array, Array]:
    """What `token_loss` returns, of logits [B, T, V] and labels [B, T]; `total` adds up V."""
    label, normaliser = from_logits(logits, labels, total)
    return nll_of(label, normaliser, labels, logits.shape[-1]), normaliser


def label_and_normaliser(
    h: Array,
    head: Array | Head,
    labels: Array,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """Logit of each token's label, and log sum exp of its logits.

    The head may be a part of the vocabulary as well as a whole one. A kernel computes both where
    the device has one, logits elsewhere.

    Args:
        h, head, labels, softcap: as for `token_loss`.
    Returns:
        (logit [B, T], 0 for a label outside [0, V); log sum exp [B, T]).
    """
    rows = h.reshape(-1, h.shape[-1])
    # The kernels have no soft-cap.
    family = None if softcap else kernel_for(linear_cross_entropy, rows, _matrix(head))
    shape = num_rows(head), h.shape[-1]
    message = "cross-entropy: backend %s for h%s head%s %s"
    logger.info(message, family or "logits", h.shape, shape, h.dtype)
    if family is None:
        return from_logits(unembed(h, head, softcap), labels)
    label, normaliser = linear_cross_entropy.label_and_normaliser(
        rows,
        _matrix(head),
        labels.reshape(-1),
        accumulator(head.bias) if isinstance(head, Head) else None,
        implementation=family,
    )
    return label.reshape(labels.shape), normaliser.reshape(labels.shape)


def from_logits(
    logits: Array,
    labels: Array,
    total: Callable = _total_over_tokens,
) -> tuple[Array, Array]:
    """What `label_and_normaliser` returns, of logits [B, T, V] and labels [B, T]."""
    # The maximum only keeps the exponentials finite, so it needs no gradient. In this form XLA
    # computes the gradient of the logits in one pass.
    top = finite_top(lax.stop_gradient(logits.max(-1)))
    is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    label = jnp.where(is_label, logits, 0).sum(-1)
    sums = total(jnp.exp(logits - top[..., None]))
    return label, log_of_sum(sums, top)


def finite_top(top: Array) -> Array:
    """The largest logits, 0 where all are -inf: -inf - -inf would be NaN."""
    return jnp.where(top == -jnp.inf, 0, top)


def log_of_sum(sums: Array, top: Array) -> Array:
    """log sum exp of logits whose exponentials, relative to `top`, add up to `sums`.

    -inf where there are none, with a gradient of 0, where that of the logarithm would be NaN.
    """
    is_empty = sums == 0
    return jnp.where(is_empty, -jnp.inf, jnp.log(jnp.where(is_empty, 1, sums)) + top)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_over_chunks(
    loss: Callable,
    num_chunks: int,
    x: Array,
    head: Array | Head,
    labels: Array,
    weights: Array,
):
    """Sums a per-token loss over chunks of T; the matmuls of its backward run in the forward.

    The loss is a sum, so its cotangent is one number. Each chunk's gradients are computed while its
    logits exist, which takes three matmuls and recomputes nothing, and the backward multiplies them
    by that number; so no logits are kept. The gradient of `head` is accumulated over chunks in at
    least float32.

    Args:
        loss: (x [B, T/n, D], head, labels, weights [B, T/n]) -> pytree of sums; its first leaf is
            the loss that is differentiated, the others are figures with no gradient.
        num_chunks: n, dividing T.
        x: [B, T, D] final hidden states.
        head: [V, D] unembedding, or with a bias.
        labels: [B, T] int32.
        weights: [B, T] float32, not differentiated.
    Returns:
        The pytree of sums over all chunks.
    Raises:
        InputError: n does not divide T.
    """

    def loss_of(chunk: tuple[Array, Array, Array]):
        x, labels, weights = chunk
        return loss(x, head, labels, weights)

    chunks = _split(num_chunks, x, labels, weights)
    return _total(lax.map(loss_of, chunks))


def _total(sums):
    """Adds up the chunks of a pytree of sums."""
    return jax.tree.map(lambda s: s.sum(0), sums)


def _forward(
    loss: Callable,
    num_chunks: int,
    x: Array,
    head: Array | Head,
    labels: Array,
    weights: Array,
):
    def add_chunk(
        total_dhead: Array | Head,
        chunk: tuple[Array, Array, Array],
    ):
        x, labels, weights = chunk

        def first_and_all(x: Array, head: Array | Head):
            sums = loss(x, head, labels, weights)
            return jax.tree.leaves(sums)[0], sums

        value, pullback, sums = jax.vjp(first_and_all, x, head, has_aux=True)
        dx, dhead = pullback(jnp.ones_like(value))
        total_dhead = jax.tree.map(lambda s, g: s + g.astype(s.dtype), total_dhead, dhead)
        return total_dhead, (dx, sums)

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(accumulator(leaf)), head)
    chunks = _split(num_chunks, x, labels, weights)
    dhead, (dx, sums) = lax.scan(add_chunk, zeros, chunks)
    dhead = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), dhead, head)
    total = _total(sums)
    dx = jnp.moveaxis(dx, 0, 1).reshape(x.shape)
    return total, (dx, dhead)


def _backward(
    loss: Callable,
    num_chunks: int,
    gradients: tuple[Array, Array | Head],
    cotangents,
):
    cotangent = jax.tree.leaves(cotangents)[0]
    dx, dhead = jax.tree.map(lambda g: g * cotangent.astype(g.dtype), gradients)
    # Labels are integers, and weights have no gradient.
    return dx, dhead, None, None


sum_over_chunks.defvjp(_forward, _backward)


def _split(num_chunks: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [n, B, T/n, ...] of each array."""
    length = arrays[0].shape[1]
    if length % num_chunks:
        expected = f"T % num_loss_chunks == 0, but T = {length}"
        raise InputError("num_loss_chunks", num_chunks, expected)

    def split(array: Array) -> Array:
        batch, length, *rest = array.shape
        chunks = array.reshape(batch, num_chunks, length // num_chunks, *rest)
        return jnp.moveaxis(chunks, 1, 0)

    return tuple(map(split, arrays))
