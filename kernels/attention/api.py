"""Attention of queries over intervals of keys: causal and full masks, windows, packed documents."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxscale.kernels.attention import pallas_backward, pallas_forward, reference
from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.kernels.checks import check_backend, require

BACKENDS = ("reference", "mosaic")
VARYING = {
    "mosaic": ("dq",)
}  # whose last bits differ from run to run: added up in the order in which blocks finish
HEAD_DIMS = (64, 128, 256)  # of the kernels; others are padded with zeros
OUTPUT_NAME = "attention_kernel"  # of what a rematerialisation had better keep
ALIGNMENT = 8  # of a row's tokens: the rows of a swizzled tile


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    low: jax.Array,
    high: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    layout: BlockLayout | None = None,
    implementation: str,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of each query t over the keys low[t] <= s < high[t].

    "mosaic" leaves out the tiles of keys that no query of a tile sees, and tests no key of those
    that all of them see. Of results and gradients (o, lse, dq, dk, dv) those in VARYING are not the
    same bits from run to run.

    Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691); Shah et al. 2024, FlashAttention-3 (arXiv
        2407.08608).
    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H], N a multiple of K; query head n reads kv head n // (N / K).
        low, high: [B, T], or [1, T] for all rows, int32, within 0 and S; a query with high <= low
            sees nothing.
        scale: factor on the logits.
        softcap: c in c * tanh(logits / c).
        layout: leaves out blocks of keys; the intervals must then be the causal mask's, low 0 and
            high t + 1, for the blocks that a layout sees whole are not compared with them.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs.
        interpret: JAX's parameters of interpretation, to try "mosaic" on a CPU; False compiles it.
    Returns:
        (o [B, T, N, H] in the type of `q`, log sum exp of each query's logits [B, N, T] float32);
        where a query sees nothing, 0 and -inf.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: 4 H FLOPs for each query, head and key in a visited tile, and 10 in the backward, 14 where
        H > 128.
    """
    _check_shapes(q, k, v, low, high)
    require(softcap is None or softcap > 0, "attention", f"softcap {softcap}", "above 0, or None")
    check_backend("attention", implementation, BACKENDS, mosaic_refusal(q, k))
    if implementation == "mosaic":
        length, head_dim = q.shape[1], q.shape[3]
        q, k, v = map(_pad, (q, k, v))
        low, high = (jnp.pad(x, ((0, 0), (0, -length % ALIGNMENT))) for x in (low, high))
        o, lse = _mosaic(q, k, v, low, high, scale, softcap, layout, interpret)
        return o[:, :length, :, :head_dim], lse[:, :, :length]
    return reference.attention(q, k, v, low, high, scale=scale, softcap=softcap, layout=layout)


def _check_shapes(
    q: jax.Array, k: jax.Array, v: jax.Array, low: jax.Array, high: jax.Array
) -> None:
    batch, length, num_heads, head_dim = q.shape
    is_fit = (
        k.shape == v.shape and k.dtype == v.dtype and (k.shape[0], k.shape[3]) == (batch, head_dim)
    )
    given = f"k {k.dtype}{k.shape} and v {v.dtype}{v.shape}"
    require(
        is_fit,
        "attention",
        given,
        f"both [B, S, K, H] of one type, with B = {batch} and H = {head_dim}",
    )
    require(
        num_heads % k.shape[2] == 0,
        "attention",
        f"N = {num_heads} and K = {k.shape[2]}",
        "N % K == 0",
    )
    is_fit = low.shape == high.shape and low.shape in ((1, length), (batch, length))
    expected = f"both [B, T] or [1, T], with B = {batch} and T = {length}"
    require(is_fit, "attention", f"low {low.shape} and high {high.shape}", expected)


def mosaic_refusal(q: jax.Array, k: jax.Array) -> str | None:
    """What of the request "mosaic" cannot do, as the text of an error; None when it can. Shapes are enough."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"q, k and v all bfloat16 or all float16, but they are {q.dtype} and {k.dtype}"
    if q.shape[3] > max(HEAD_DIMS):
        return f"head_dim <= {max(HEAD_DIMS)}, but head_dim = {q.shape[3]}"
    if jax.__version_info__ < (
        0,
        11,
    ):  # which cannot put a kernel that writes to a reference into a scan
        return f"jax >= 0.11, but this is {jax.__version__}"
    return None


def _pad(x: jax.Array) -> jax.Array:
    """Zeros up to the next length and head dim that the kernels take; such keys are in no interval."""
    head_dim = min(h for h in HEAD_DIMS if h >= x.shape[3])
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % ALIGNMENT), (0, 0), (0, head_dim - x.shape[3])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _mosaic(q, k, v, low, high, scale, softcap, layout, interpret):
    return _forward(q, k, v, low, high, scale, softcap, layout, interpret)[0]


def _forward(q, k, v, low, high, scale, softcap, layout, interpret):
    settings = dict(scale=scale, softcap=softcap, layout=layout, interpret=interpret)
    o, lse = pallas_forward.forward(q, k, v, low, high, **settings)
    o, lse = checkpoint_name(o, OUTPUT_NAME), checkpoint_name(lse, OUTPUT_NAME)
    return (o, lse), (q, k, v, low, high, o, lse)


def _backward(scale, softcap, layout, interpret, kept, cotangents):
    q, k, v, low, high, o, lse = kept
    settings = dict(scale=scale, softcap=softcap, layout=layout, interpret=interpret)
    return (
        *pallas_backward.backward(q, k, v, o, lse, *cotangents, low, high, **settings),
        None,
        None,
    )


_mosaic.defvjp(_forward, _backward)
