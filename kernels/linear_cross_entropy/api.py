"""Linear cross-entropy: each token's logit of its label, and log sum exp of all its logits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.kernels.checks import check_backend, require
from jaxscale.kernels.linear_cross_entropy import pallas, reference
from jaxscale.kernels.linear_cross_entropy.block_sizes import H200
from jaxscale.kernels.parts import parts_of
from jaxscale.kernels.triton_call import blocks_of, missing

BACKENDS = ("reference", "mosaic", "triton")
UNIT = 64  # numbers of a row that the kernels read at once


def label_and_normaliser(
    h: Array,
    head: Array,
    labels: Array,
    bias: Array | None = None,
    *,
    implementation: str,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Each token's logit of its label, and log sum exp of all its logits h head^T + bias.

    Their difference is the loss. A kernel keeps one number of 16 bits for each logit between
    forward and backward: its exponential, relative to that of the largest of its tile. From these
    the backward computes the gradient of the logits in one pass.

    Source: Wijmans et al. 2024, Cut Your Losses (arXiv 2411.09009), equations 2 to 4; but what they
        recompute is kept.
    Args:
        h: [T, D].
        head: [V, D] of the same type.
        labels: [T] int32; one outside [0, V) has the logit 0.
        bias: [V] float32, if there is one. -inf forbids a word: its logit is -inf, its gradients
            are 0, and all else is as without it. With every word forbidden log sum exp is -inf.
            What is below the range of the type of `h` forbids a word likewise.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs, "triton" for Ampere and newer.
        interpret: JAX's parameters of interpretation, to try a kernel on a CPU; False compiles it.
    Returns:
        (logit of the label [T], log sum exp [T]), float32.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: 2 T V D FLOPs and twice as many in the backward; 2 T V bytes kept, as much again while the
        backward runs.
    """
    given = f"h {h.shape}, head {head.shape} and labels {labels.shape}"
    is_fit = h.shape == (*labels.shape, head.shape[-1])
    require(is_fit, "label_and_normaliser", given, "[T, D], [V, D] and [T]")
    if bias is not None:
        given = f"bias {bias.shape} {bias.dtype} and head {head.shape}"
        is_fit = bias.shape == head.shape[:1] and bias.dtype == jnp.float32
        require(is_fit, "label_and_normaliser", given, "[V] float32 and [V, D]")
    reason = refusal(implementation, h, head)
    check_backend("label_and_normaliser", implementation, BACKENDS, reason)
    if implementation == "reference":
        return reference.label_and_normaliser(h, head, labels, bias)
    return _by_kernel(h, head, labels, bias, implementation, interpret)


def refusal(implementation: str, h: Array, head: Array) -> str | None:
    """What a kernel would need to compute the request, as the text of an error.

    None when it can, and for what is no kernel. Shapes and types are enough.
    """
    if implementation == "reference":
        return None
    is_half = h.dtype in (jnp.bfloat16, jnp.float16)
    if not is_half or head.dtype != h.dtype:
        return f"h and head both bfloat16 or both float16, but they are {h.dtype} and {head.dtype}"
    return missing() if implementation == "triton" else None


def _kernel(implementation: str) -> tuple[Callable, int]:
    """(the backend's `exponentials`, columns of its tiles)."""
    if implementation == "triton":
        # Triton is optional, so it is imported where it is used.
        from jaxscale.kernels.linear_cross_entropy import triton

        return triton.exponentials, blocks_of(triton.OPERATION).columns
    return functools.partial(pallas.exponentials, blocks=H200), H200.columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _by_kernel(
    h: Array,
    head: Array,
    labels: Array,
    bias: Array | None,
    implementation: str,
    interpret: Any,
) -> tuple[Array, Array]:
    return _forward(h, head, labels, bias, implementation, interpret)[0]


def _with_bias_in_columns(
    h: Array,
    head: Array,
    bias: Array,
) -> tuple[Array, Array]:
    """h and head with three columns more and zeros up to whole units, whose product has the bias.

    In `h` the columns are ones; in the head they are three parts that add up to the bias. Only the
    kernel reads these. Rows of D + 3 numbers, or gradients of them, would not be aligned.
    """
    first, *others = (part.astype(h.dtype) for part in parts_of(bias, 3))
    # Where the first part is -inf the others are infinite or NaN.
    others = [jnp.where(jnp.isinf(first), 0, part) for part in others]
    columns = jnp.stack([first, *others], -1)
    zeros = (0, 0), (0, -(h.shape[1] + 3) % UNIT)
    h = jnp.concatenate([h, jnp.ones((len(h), 3), h.dtype)], -1)
    return jnp.pad(h, zeros), jnp.pad(jnp.concatenate([head, columns], -1), zeros)


def _forward(
    h: Array,
    head: Array,
    labels: Array,
    bias: Array | None,
    implementation: str,
    interpret: Any,
):
    exponentials, _ = _kernel(implementation)
    operands = (h, head) if bias is None else _with_bias_in_columns(h, head, bias)
    values, tops, sums = exponentials(*operands, interpret=interpret)
    # Join the sums of the tiles, each of which is relative to its own largest logit.
    top = _finite(tops.max(0))
    total = (sums * jnp.exp(tops - top)).sum(0)
    normaliser = top + jnp.log(total)
    vocabulary = head.shape[0]
    is_known = (labels >= 0) & (labels < vocabulary)
    known = jnp.clip(labels, 0, vocabulary - 1)
    rows = jnp.where(is_known[:, None], head[known], 0)
    label = jnp.einsum("td,td->t", h, rows, preferred_element_type=jnp.float32)
    if bias is not None:
        label = label + jnp.where(is_known, bias[known], 0)
    # Times this, a tile's exponentials are probabilities.
    scales = jnp.exp(tops - _finite(normaliser))
    return (label, normaliser), (h, head, labels, bias, values, scales)


def _backward(
    implementation: str,
    interpret: Any,
    residuals: tuple[Array, ...],
    cotangents: tuple[Array, Array],
):
    h, head, labels, bias, values, scales = residuals
    dlabel, dnormaliser = cotangents
    vocabulary = head.shape[0]
    if bias is not None:
        dlabel = jnp.where(_is_forbidden(bias, labels), 0, dlabel)
    scale = (scales * dnormaliser).T
    _, columns = _kernel(implementation)
    scale = jnp.repeat(scale, columns, axis=1)[:, :vocabulary]
    is_label = jnp.arange(vocabulary) == labels[:, None]
    of_normaliser = values[:, :vocabulary].astype(jnp.float32) * scale
    of_label = jnp.where(is_label, dlabel[:, None], 0)
    dlogits = of_normaliser + of_label
    dbias = None if bias is None else dlogits.sum(0)
    dlogits = dlogits.astype(h.dtype)
    dh = jnp.einsum("tv,vd->td", dlogits, head)
    dhead = jnp.einsum("tv,td->vd", dlogits, h)
    return dh, dhead, None, dbias


_by_kernel.defvjp(_forward, _backward)


def _finite(top: Array) -> Array:
    """The largest logits, 0 where all are -inf: -inf - -inf would be NaN."""
    return jnp.where(top == -jnp.inf, 0, top)


def _is_forbidden(bias: Array, labels: Array) -> Array:
    """[T] whether a label's own bias is -inf."""
    return bias[jnp.clip(labels, 0, len(bias) - 1)] == -jnp.inf
