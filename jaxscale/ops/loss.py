"""Cross-entropy over a large vocabulary without its logits."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, InputError


@jax.custom_vjp
def project(x: Array, head: Array) -> Array:
    """Logits in at least float32, as the matmul accumulates them: rounded to bfloat16, one in ten tops would be a tie.

    Its gradient rounds the cotangent to the type of `x`; plainly differentiated, the two matmuls would run in float32.

    Args:
        x: [B, T, D].
        head: [V, D].
    Returns:
        [B, T, V].
    """
    return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _project_backward(arguments: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, head = arguments
    cotangent = cotangent.astype(x.dtype)
    return jnp.einsum("btv,vd->btd", cotangent, head), jnp.einsum("btv,btd->vd", cotangent, x)


project.defvjp(lambda x, head: (project(x, head), (x, head)), _project_backward)


def token_loss(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Negative log-likelihood and log-normaliser of each token.

    Args:
        logits: [B, T, V]; the softmax is taken in at least float32.
        labels: [B, T] int32; one outside [0, V), such as -100, has a loss of 0.
    Returns:
        (nll [B, T], log sum exp [B, T]).
    """
    logits = accumulator(logits)
    normaliser = jax.nn.logsumexp(logits, -1)
    label = jnp.take_along_axis(logits, labels[..., None], -1, mode="clip")[..., 0]
    return jnp.where((labels >= 0) & (labels < logits.shape[-1]), normaliser - label, 0), normaliser


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_over_chunks(loss: Callable, num_chunks: int, x: Array, head: Array, labels: Array, weights: Array):
    """Sums a per-token loss over chunks of T; the backward's matmuls run in the forward, so no logits are kept.

    The loss is a sum, so its cotangent is one number: each chunk's gradients are made while its logits exist (three
    matmuls and nothing recomputed) and multiplied by that number in the backward. The gradient of `head` is
    accumulated over chunks in at least float32.

    Args:
        loss: (x [B, T/n, D], head [V, D], labels, weights [B, T/n]) -> pytree of sums; its first leaf is the loss that
            is differentiated, the others are figures with no gradient.
        num_chunks: n, dividing T.
        x: [B, T, D] final hidden states.
        head: [V, D] unembedding.
        labels: [B, T] int32.
        weights: [B, T] float32, not differentiated.
    Returns:
        The pytree of sums over all chunks.
    Raises:
        InputError: n does not divide T.
    """
    chunks = _split(num_chunks, x, labels, weights)
    return jax.tree.map(lambda s: s.sum(0), lax.map(lambda c: loss(c[0], head, c[1], c[2]), chunks))


def _forward(loss: Callable, num_chunks: int, x: Array, head: Array, labels: Array, weights: Array):
    def one(head_gradient: Array, chunk: tuple[Array, Array, Array]):
        x_chunk, labels_chunk, weights_chunk = chunk

        def first_and_all(x_chunk: Array, head: Array):
            sums = loss(x_chunk, head, labels_chunk, weights_chunk)
            return jax.tree.leaves(sums)[0], sums

        value, pullback, sums = jax.vjp(first_and_all, x_chunk, head, has_aux=True)
        dx, dhead = pullback(jnp.ones_like(value))
        return head_gradient + dhead.astype(head_gradient.dtype), (dx, sums)

    zeros = jnp.zeros_like(accumulator(head))
    dhead, (dx, sums) = lax.scan(one, zeros, _split(num_chunks, x, labels, weights))
    return jax.tree.map(lambda s: s.sum(0), sums), (jnp.moveaxis(dx, 0, 1).reshape(x.shape), dhead.astype(head.dtype))


def _backward(loss: Callable, num_chunks: int, gradients: tuple[Array, Array], cotangents):
    cotangent = jax.tree.leaves(cotangents)[0]
    dx, dhead = (g * cotangent.astype(g.dtype) for g in gradients)
    return dx, dhead, None, None  # labels are integers, and weights have no gradient


sum_over_chunks.defvjp(_forward, _backward)


def _split(num_chunks: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [n, B, T/n, ...] of each array."""
    length = arrays[0].shape[1]
    if length % num_chunks:
        raise InputError("num_loss_chunks", num_chunks, f"T % num_loss_chunks == 0, but T = {length}")
    return tuple(
        jnp.moveaxis(a.reshape(a.shape[0], num_chunks, a.shape[1] // num_chunks, *a.shape[2:]), 1, 0) for a in arrays
    )
