"""Attention of queries over intervals of keys: causal and full masks, windows, packed documents."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxscale.kernels.attention import pallas_backward, pallas_forward, reference
from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.kernels.checks import check_backend, check_invariant, require
from jaxscale.kernels.triton_call import missing

BACKENDS = ("reference", "mosaic", "triton")
# Results of a backend whose last bits differ from run to run, because they are added up in the
# order in which blocks finish.
VARYING = {"mosaic": ("dq",)}
# Those that the kernels take; heads of others are padded with zeros.
HEAD_DIMS = {"mosaic": (64, 96, 128, 256), "triton": (64, 128, 256)}
# Names the kernel's results, for rematerialisation policies that keep them.
OUTPUT_NAME = "attention_kernel"
# The length of a row is a multiple of the rows of a swizzled tile.
ALIGNMENT = 8


def attention(
    q: Array,
    k: Array,
    v: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None = None,
    layout: BlockLayout | None = None,
    is_invariant: bool = False,
    implementation: str,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Softmax attention of each query t over the keys low[t] <= s < high[t].

    The kernels skip the tiles of keys that no query of a tile sees, and do not mask those that all
    of them see whole. Of the results and gradients (o, lse, dq, dk, dv) those in VARYING are not
    the same bits from run to run.

    Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691); Shah et al. 2024, FlashAttention-3 (arXiv
        2407.08608).
    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H], N a multiple of K; query head n reads kv head n // (N / K).
        low, high: [B, T], or [1, T] for all rows, int32, within 0 and S. A query with high <= low
            sees nothing.
        scale: factor on the logits.
        softcap: c in c * tanh(logits / c); None for none.
        layout: hides blocks of keys. The intervals must then be those of the causal mask, low 0 and
            high t + 1: blocks that a layout sees whole are not compared with them.
        is_invariant: whether a query's bits may depend on its own keys alone, where these begin at
            a multiple of 64. They are then taken in tiles of 64. By "mosaic" alone.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs, "triton" for Ampere and newer.
        interpret: JAX's parameters of interpretation, to try a kernel on a CPU; False compiles it.
    Returns:
        (o [B, T, N, H] in the type of `q`, log sum exp of each query's logits [B, N, T] float32);
        where a query sees nothing, 0 and -inf.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: 4 H FLOPs for each query, head and key in a visited tile. The backward takes 10 H; 14 H
        where H > 128, and by "triton".
    """
    _check_shapes(q, k, v, low, high)
    require(softcap is None or softcap > 0, "attention", f"softcap {softcap}", "above 0, or None")
    reason = refusal(implementation, q, k)
    check_backend("attention", implementation, BACKENDS, reason)
    check_invariant("attention", implementation, is_invariant)
    if implementation == "reference":
        settings = dict(scale=scale, softcap=softcap, layout=layout)
        return reference.attention(q, k, v, low, high, **settings)
    length, head_dim = q.shape[1], q.shape[3]
    q, k, v = (_pad(x, implementation) for x in (q, k, v))
    margins = ((0, 0), (0, -length % ALIGNMENT))
    low, high = (jnp.pad(x, margins) for x in (low, high))
    settings = scale, softcap, layout, is_invariant, implementation, interpret
    o, lse = _by_kernel(q, k, v, low, high, *settings)
    o = o[:, :length, :, :head_dim]
    return o, lse[:, :, :length]


def _check_shapes(
    q: Array,
    k: Array,
    v: Array,
    low: Array,
    high: Array,
) -> None:
    batch, length, num_heads, head_dim = q.shape
    is_same = k.shape == v.shape and k.dtype == v.dtype
    num_rows, _, kv_heads, key_dim = k.shape
    is_fit = is_same and (num_rows, key_dim) == (batch, head_dim)
    given = f"k {k.dtype}{k.shape} and v {v.dtype}{v.shape}"
    expected = f"both [B, S, K, H] of one type, with B = {batch} and H = {head_dim}"
    require(is_fit, "attention", given, expected)
    given = f"N = {num_heads} and K = {kv_heads}"
    require(num_heads % kv_heads == 0, "attention", given, "N % K == 0")
    shapes = (1, length), (batch, length)
    is_fit = low.shape == high.shape and low.shape in shapes
    given = f"low {low.shape} and high {high.shape}"
    expected = f"both [B, T] or [1, T], with B = {batch} and T = {length}"
    require(is_fit, "attention", given, expected)


def refusal(implementation: str, q: Array, k: Array) -> str | None:
    """What a kernel would need to compute the request, as the text of an error.

    None when it can, and for what is no kernel. Shapes and types are enough.
    """
    if implementation == "reference":
        return None
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    if not is_half or k.dtype != q.dtype:
        return f"q, k and v all bfloat16 or all float16, but they are {q.dtype} and {k.dtype}"
    widest = max(HEAD_DIMS[implementation])
    if q.shape[3] > widest:
        return f"head_dim <= {widest}, but head_dim = {q.shape[3]}"
    # jax 0.10 cannot put a kernel that writes to a reference into a scan.
    if implementation == "mosaic" and jax.__version_info__ < (0, 11):
        return f"jax >= 0.11, but this is {jax.__version__}"
    return missing() if implementation == "triton" else None


def _pad(x: Array, implementation: str) -> Array:
    """Adds zeros up to the next length and head dim that the kernels take.

    Keys that are added lie in no interval.
    """
    _, length, _, given = x.shape
    head_dim = min(h for h in HEAD_DIMS[implementation] if h >= given)
    margins = (
        (0, 0),
        (0, -length % ALIGNMENT),
        (0, 0),
        (0, head_dim - given),
    )
    return jnp.pad(x, margins)


def _kernels(implementation: str) -> tuple[Callable, Callable]:
    """The backend's `forward` and `backward`."""
    if implementation == "triton":
        # Triton is optional, so it is imported where it is used.
        from jaxscale.kernels.attention import triton_backward, triton_forward

        return triton_forward.forward, triton_backward.backward
    return pallas_forward.forward, pallas_backward.backward


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9, 10))
def _by_kernel(
    q,
    k,
    v,
    low,
    high,
    scale,
    softcap,
    layout,
    is_invariant,
    implementation,
    interpret,
):
    settings = scale, softcap, layout, is_invariant, implementation, interpret
    results, _ = _forward(q, k, v, low, high, *settings)
    return results


def _forward(
    q,
    k,
    v,
    low,
    high,
    scale,
    softcap,
    layout,
    is_invariant,
    implementation,
    interpret,
):
    forward, _ = _kernels(implementation)
    settings = dict(scale=scale, softcap=softcap, layout=layout, interpret=interpret)
    if is_invariant:
        settings["is_invariant"] = True
    o, lse = forward(q, k, v, low, high, **settings)
    o = checkpoint_name(o, OUTPUT_NAME)
    lse = checkpoint_name(lse, OUTPUT_NAME)
    return (o, lse), (q, k, v, low, high, o, lse)


def _backward(
    scale,
    softcap,
    layout,
    is_invariant,
    implementation,
    interpret,
    residuals,
    cotangents,
):
    q, k, v, low, high, o, lse = residuals
    do, dlse = cotangents
    _, backward = _kernels(implementation)
    settings = dict(scale=scale, softcap=softcap, layout=layout, interpret=interpret)
    delta = row_sums(o, do) - dlse
    arguments = q, k, v, do, lse, delta, low, high
    return *backward(*arguments, **settings, dq_dtype=q.dtype), None, None


_by_kernel.defvjp(_forward, _backward)


def row_sums(o: Array, do: Array) -> Array:
    """The products of an output and its cotangent, [B, T, N, H], summed over H: [B, N, T]."""
    wide = jnp.promote_types(o.dtype, jnp.float32)
    return jnp.einsum("btnh,btnh->bnt", o, do, preferred_element_type=wide)


def gradients(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None = None,
    implementation: str,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """The gradients that go through some of the keys, given the forward over all of them.

    The gradients of a sequence's blocks of keys add up to those of the whole.

    Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), algorithm 2, whose D is our delta.
    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H], the block.
        do: [B, T, N, H] cotangent of the output over all keys, in the type of `q`.
        lse: [B, N, T] float32, over all keys.
        delta: [B, N, T] float32, `row_sums` of the output over all keys and `do`.
        low, high, scale, softcap, implementation, interpret: as for `attention`, of the block.
    Returns:
        (dq in at least float32, dk and dv in the type of `k`), shaped as q, k and v.
    Raises:
        ValueError: as `attention`.
    """
    _check_shapes(q, k, v, low, high)
    reason = refusal(implementation, q, k)
    check_backend("attention", implementation, BACKENDS, reason)
    settings = dict(scale=scale, softcap=softcap)
    if implementation == "reference":
        return reference.gradients(q, k, v, do, lse, delta, low, high, **settings)
    _, length, _, head_dim = q.shape
    num_keys = k.shape[1]
    q, k, v, do = (_pad(x, implementation) for x in (q, k, v, do))
    margins = ((0, 0), (0, -length % ALIGNMENT))
    low, high = (jnp.pad(x, margins) for x in (low, high))
    by_head = ((0, 0), *margins)
    lse = jnp.pad(lse, by_head, constant_values=-jnp.inf)
    delta = jnp.pad(delta, by_head)
    _, backward = _kernels(implementation)
    settings |= dict(dq_dtype=jnp.float32, interpret=interpret)
    found = backward(q, k, v, do, lse, delta, low, high, **settings)
    dq, dk, dv = (x[..., :head_dim] for x in found)
    return dq[:, :length], dk[:, :num_keys], dv[:, :num_keys]
