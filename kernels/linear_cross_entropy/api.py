"""Linear cross-entropy: of the logits only each token's label's and the log of the sum of exponentials."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.kernels.checks import check_backend, require
from jaxscale.kernels.linear_cross_entropy import pallas, reference
from jaxscale.kernels.linear_cross_entropy.block_sizes import H200

BACKENDS = ("reference", "mosaic")


def label_and_normaliser(
    h: jax.Array, head: jax.Array, labels: jax.Array, *, implementation: str, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Each token's logit of its label and log sum exp of all its logits h head^T; their difference is the loss.

    "mosaic" keeps one number of 16 bits for each logit between forward and backward, its
    exponential beside the largest of its tile, from which the backward makes the gradient of the
    logits in one pass.

    Source: Wijmans et al. 2024, Cut Your Losses (arXiv 2411.09009), equations 2 to 4, but what they
        recompute is kept.
    Args:
        h: [T, D].
        head: [V, D] of the same type.
        labels: [T] int32; one outside [0, V) has the logit 0.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs.
        interpret: JAX's parameters of interpretation, to try "mosaic" on a CPU; False compiles it.
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
    check_backend("label_and_normaliser", implementation, BACKENDS, mosaic_refusal(h, head))
    if implementation == "mosaic":
        return _mosaic(h, head, labels, interpret)
    return reference.label_and_normaliser(h, head, labels)


def mosaic_refusal(h: jax.Array, head: jax.Array) -> str | None:
    """What of the request "mosaic" cannot do, as the text of an error; None when it can. Shapes are enough."""
    if h.dtype not in (jnp.bfloat16, jnp.float16) or head.dtype != h.dtype:
        return f"h and head both bfloat16 or both float16, but they are {h.dtype} and {head.dtype}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mosaic(
    h: jax.Array, head: jax.Array, labels: jax.Array, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    return _forward(h, head, labels, interpret)[0]


def _forward(h: jax.Array, head: jax.Array, labels: jax.Array, interpret: Any):
    values, tops, sums = pallas.exponentials(h, head, blocks=H200, interpret=interpret)
    top = tops.max(0)
    normaliser = top + jnp.log((sums * jnp.exp(tops - top)).sum(0))
    is_known = (labels >= 0) & (labels < head.shape[0])
    rows = jnp.where(is_known[:, None], head[jnp.clip(labels, 0, head.shape[0] - 1)], 0)
    label = jnp.einsum("td,td->t", h, rows, preferred_element_type=jnp.float32)
    return (label, normaliser), (h, head, labels, values, jnp.exp(tops - normaliser))


def _backward(interpret: Any, kept: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]):
    h, head, labels, values, scales = kept
    dlabel, dnormaliser = cotangents
    vocabulary = head.shape[0]
    scale = jnp.repeat((scales * dnormaliser).T, H200.columns, axis=1)[:, :vocabulary]
    is_label = jnp.arange(vocabulary) == labels[:, None]
    dlogits = values[:, :vocabulary].astype(jnp.float32) * scale + jnp.where(
        is_label, dlabel[:, None], 0
    )
    dlogits = dlogits.astype(h.dtype)
    return jnp.einsum("tv,vd->td", dlogits, head), jnp.einsum("tv,td->vd", dlogits, h), None


_mosaic.defvjp(_forward, _backward)
