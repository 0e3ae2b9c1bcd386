"""Cross-entropy over a large vocabulary without its logits."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.linear_cross_entropy import api as linear_cross_entropy
from jaxscale.ops.device import is_hopper
from jaxscale.ops.precision import accumulator
from jaxscale.ops.split_product import parts_of
from jaxscale.types import Array, InputError

logger = logging.getLogger(__name__)


@jax.custom_vjp
def project(x: Array, head: Array) -> Array:
    """Logits in at least float32, as the matmul accumulates them: rounded to bfloat16, one in ten tops would be a tie.

    Its gradient rounds the cotangent to the type of `x`; plainly differentiated, the two matmuls
    would run in float32.

    Args:
        x: [B, T, D].
        head: [V, D].
    Returns:
        [B, T, V].
    """
    return jnp.einsum(
        "btd,vd->btv", x, head, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
    )


def _project_backward(arguments: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, head = arguments
    cotangent = cotangent.astype(x.dtype)
    return jnp.einsum("btv,vd->btd", cotangent, head), jnp.einsum("btv,btd->vd", cotangent, x)


project.defvjp(lambda x, head: (project(x, head), (x, head)), _project_backward)


class Head(NamedTuple):
    """An unembedding with a bias; one without is its matrix alone.

    Args:
        weights: [V, D].
        bias: [V], added in at least float32.
    """

    weights: Array
    bias: Array


def num_rows(head: Array | Head) -> int:
    """V, or what of it is here."""
    return (head.weights if isinstance(head, Head) else head).shape[0]


def unembed(h: Array, head: Array | Head, softcap: float | None = None) -> Array:
    """Logits [B, T, V] of `project`, plus the bias if there is one, as c * tanh(logits / c) with a soft-cap c."""
    logits = (
        project(h, head.weights) + accumulator(head.bias)
        if isinstance(head, Head)
        else project(h, head)
    )
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def token_loss(
    h: Array, head: Array | Head, labels: Array, softcap: float | None = None
) -> tuple[Array, Array]:
    """Negative log-likelihood and log-normaliser of each token; the softmax is taken in at least float32.

    Args:
        h: [B, T, D].
        head: [V, D], or with a bias.
        labels: [B, T] int32; one outside [0, V), such as -100, has a loss of 0.
        softcap: as in `unembed`.
    Returns:
        (nll [B, T], log sum exp [B, T]).
    """
    label, normaliser = label_and_normaliser(h, head, labels, softcap)
    return jnp.where((labels >= 0) & (labels < num_rows(head)), normaliser - label, 0), normaliser


def label_and_normaliser(
    h: Array, head: Array | Head, labels: Array, softcap: float | None = None
) -> tuple[Array, Array]:
    """Logit of each token's label [B, T], 0 for one outside [0, V), and log sum exp of its logits [B, T].

    Of part of a vocabulary as of a whole one. On Hopper GPUs by a kernel, elsewhere by logits;
    arguments as `token_loss`.
    """
    implementation = (
        "mosaic" if is_hopper() and _mosaic_refusal(h, head, softcap) is None else "logits"
    )
    shape = num_rows(head), h.shape[-1]
    logger.info(
        "cross-entropy: backend %s for h%s head%s %s", implementation, h.shape, shape, h.dtype
    )
    if implementation == "mosaic":
        h, head = _with_bias_in_columns(h.reshape(-1, h.shape[-1]), head)
        label, normaliser = linear_cross_entropy.label_and_normaliser(
            h, head, labels.reshape(-1), implementation="mosaic"
        )
        return label.reshape(labels.shape), normaliser.reshape(labels.shape)
    return from_logits(unembed(h, head, softcap), labels)


def from_logits(logits: Array, labels: Array) -> tuple[Array, Array]:
    """What `label_and_normaliser` returns, of logits [B, T, V] and labels [B, T]."""
    # The maximum only steadies the exponentials. In this form XLA makes the gradient of the logits
    # in one pass.
    top = lax.stop_gradient(logits.max(-1))
    is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    label = jnp.where(is_label, logits, 0).sum(-1)
    return label, jnp.log(jnp.exp(logits - top[..., None]).sum(-1)) + top


def _with_bias_in_columns(h: Array, head: Array | Head) -> tuple[Array, Array]:
    """h [T, D] and head [V, D]; for a bias with three columns more: ones, and what adds up to it in float32."""
    if not isinstance(head, Head):
        return h, head
    first, *rest = parts_of(accumulator(head.bias), 3)
    columns = [
        first,
        *map(lax.stop_gradient, rest),
    ]  # the bias is one parameter, so one column has its gradient
    columns = jnp.stack(columns, -1).astype(h.dtype)
    return jnp.concatenate([h, jnp.ones((len(h), 3), h.dtype)], -1), jnp.concatenate(
        [head.weights, columns], -1
    )


def _mosaic_refusal(h: Array, head: Array | Head, softcap: float | None) -> str | None:
    """What of the loss our kernel cannot do; None when it can."""
    if softcap is not None:
        return "a soft-cap"
    weights = head.weights if isinstance(head, Head) else head
    return linear_cross_entropy.mosaic_refusal(h.reshape(-1, h.shape[-1]), weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_over_chunks(
    loss: Callable, num_chunks: int, x: Array, head: Array | Head, labels: Array, weights: Array
):
    """Sums a per-token loss over chunks of T; the backward's matmuls run in the forward, so no logits are kept.

    The loss is a sum, so its cotangent is one number: each chunk's gradients are made while its
    logits exist (three matmuls and nothing recomputed) and multiplied by that number in the
    backward. The gradient of `head` is accumulated over chunks in at least float32.

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
    chunks = _split(num_chunks, x, labels, weights)
    return jax.tree.map(lambda s: s.sum(0), lax.map(lambda c: loss(c[0], head, c[1], c[2]), chunks))


def _forward(
    loss: Callable, num_chunks: int, x: Array, head: Array | Head, labels: Array, weights: Array
):
    def one(head_gradient: Array | Head, chunk: tuple[Array, Array, Array]):
        x_chunk, labels_chunk, weights_chunk = chunk

        def first_and_all(x_chunk: Array, head: Array | Head):
            sums = loss(x_chunk, head, labels_chunk, weights_chunk)
            return jax.tree.leaves(sums)[0], sums

        value, pullback, sums = jax.vjp(first_and_all, x_chunk, head, has_aux=True)
        dx, dhead = pullback(jnp.ones_like(value))
        return jax.tree.map(lambda s, g: s + g.astype(s.dtype), head_gradient, dhead), (dx, sums)

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(accumulator(leaf)), head)
    dhead, (dx, sums) = lax.scan(one, zeros, _split(num_chunks, x, labels, weights))
    dhead = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), dhead, head)
    return jax.tree.map(lambda s: s.sum(0), sums), (jnp.moveaxis(dx, 0, 1).reshape(x.shape), dhead)


def _backward(loss: Callable, num_chunks: int, gradients: tuple[Array, Array | Head], cotangents):
    cotangent = jax.tree.leaves(cotangents)[0]
    dx, dhead = jax.tree.map(lambda g: g * cotangent.astype(g.dtype), gradients)
    return dx, dhead, None, None  # labels are integers, and weights have no gradient


sum_over_chunks.defvjp(_forward, _backward)


def _split(num_chunks: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [n, B, T/n, ...] of each array."""
    length = arrays[0].shape[1]
    if length % num_chunks:
        raise InputError(
            "num_loss_chunks", num_chunks, f"T % num_loss_chunks == 0, but T = {length}"
        )
    return tuple(
        jnp.moveaxis(
            a.reshape(a.shape[0], num_chunks, a.shape[1] // num_chunks, *a.shape[2:]), 1, 0
        )
        for a in arrays
    )
