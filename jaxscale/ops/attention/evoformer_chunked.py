"""The Evoformer's attention over some keys at a time, forward and backward, on any device.

Source: Rabe and Staats 2021, "Self-attention does not need O(n^2) memory" (arXiv 2112.05682),
    section 3; the backward is algorithm 2 of FlashAttention-2 (arXiv 2307.08691) with the gradients
    of both biases.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.evoformer_attention.varying import alike
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array

Operands = tuple[Array, Array, Array, Array | None, Array | None]
KEYS = (2, 2, 4, 4)  # the dim of the keys in k, v and the two biases


def attend(*operands: Array | None, key_chunk: int) -> Array:
    """As `evoformer.evoformer_attention`, of whose logits [B, M, N, T, key_chunk] exist at a time.

    Args:
        operands: q, k, v, mask_bias and pair_bias.
        key_chunk: keys that are taken at a time.
    """
    return _attend(alike(operands), key_chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(operands: Operands, key_chunk: int) -> Array:
    o, _ = _forward(operands, key_chunk)
    return o


def _forward(operands: Operands, key_chunk: int) -> tuple[Array, Any]:
    """(output, what the backward needs): no array of it has both queries and keys.

    The largest logit and the denominator are kept apart: a mask of -1e9 on every key would round
    the denominator's logarithm away in their sum.
    """
    q = operands[0]
    batch, rows, queries, heads, width = q.shape
    wide = accumulator(q).dtype

    def add(sums: tuple, start: Array | int, size: int) -> tuple:
        top, total, weighted = sums
        k, v, *biases = _chunk(operands, start, size)
        logits = _logits(q, k, biases)
        new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
        # Of a query that has seen no key yet the largest logit is -inf; -inf - -inf would be NaN.
        finite = jnp.where(new_top == -jnp.inf, 0, new_top)
        weights = jnp.exp(logits - finite)
        scale = jnp.exp(top - finite)
        total = total * scale + weights.sum(-1, keepdims=True)
        weighted = weighted * scale + _product("bmnts,bmsnh->bmnth", weights, v)
        return new_top, total, weighted

    per_query = (batch, rows, heads, queries, 1)
    sums = (
        jnp.full(per_query, -jnp.inf, wide),
        jnp.zeros(per_query, wide),
        jnp.zeros((*per_query[:-1], width), wide),
    )
    top, total, weighted = _over_keys(add, sums, operands, key_chunk)
    top = jnp.where(top == -jnp.inf, 0, top)
    total = jnp.where(total == 0, 1, total)
    o = jnp.swapaxes(weighted / total, 2, 3)
    o = o.astype(q.dtype)
    return o, (operands, o, top, total)


def _backward(
    key_chunk: int,
    residuals: Any,
    do: Array,
) -> tuple[Operands]:
    operands, o, top, total = residuals
    q, *others = operands
    scale = q.shape[-1] ** -0.5
    delta = _product("bmtnh,bmtnh->bmnt", o, do)
    delta = delta[..., None]

    def add(gradients: tuple, start: Array | int, size: int) -> tuple:
        dq, *of_keys = gradients
        k, v, *biases = _chunk(operands, start, size)
        weights = jnp.exp(_logits(q, k, biases) - top) / total
        dweights = _product("bmtnh,bmsnh->bmnts", do, v)
        dlogits = weights * (dweights - delta)
        dq += _product("bmnts,bmsnh->bmtnh", dlogits, k) * scale
        parts = (
            _product("bmnts,bmtnh->bmsnh", dlogits, q) * scale,
            _product("bmnts,bmtnh->bmsnh", weights, do),
            dlogits.sum((2, 3), keepdims=True),
            dlogits.sum(1, keepdims=True),
        )
        written = [
            None if whole is None else _with_part(whole, part, start, dim)
            for whole, part, dim in zip(of_keys, parts, KEYS)
        ]
        return dq, *written

    zeros = (
        jnp.zeros_like(accumulator(q)),
        *jax.tree.map(jnp.zeros_like, others),
    )
    dq, *of_keys = _over_keys(add, zeros, operands, key_chunk)
    dq = dq.astype(q.dtype)
    return ((dq, *of_keys),)


_attend.defvjp(_forward, _backward)


def _over_keys(
    add: Callable[[Any, Array | int, int], Any],
    sums: Any,
    operands: Operands,
    key_chunk: int,
) -> Any:
    """add(sums, first key, number of keys) for each chunk; a rest is a chunk of its own size."""
    num_keys = operands[1].shape[2]
    num_chunks, rest = divmod(num_keys, key_chunk)
    # What is summed varies over the axes of a `shard_map` over which the operands do.
    sums, _ = alike((sums, operands))

    def of_number(number: Array, sums: Any) -> Any:
        return add(sums, number * key_chunk, key_chunk)

    if num_chunks:
        sums = lax.fori_loop(0, num_chunks, of_number, sums)
    if rest:
        sums = add(sums, num_keys - rest, rest)
    return sums


def _chunk(
    operands: Operands,
    start: Array | int,
    size: int,
) -> list[Array | None]:
    """k, v and the biases of some keys."""
    return [
        None if x is None else lax.dynamic_slice_in_dim(x, start, size, dim)
        for x, dim in zip(operands[1:], KEYS)
    ]


def _with_part(
    whole: Array,
    part: Array,
    start: Array | int,
    dim: int,
) -> Array:
    """`whole` with `part` in the place of the keys from `start` on."""
    part = part.astype(whole.dtype)
    return lax.dynamic_update_slice_in_dim(whole, part, start, dim)


def _logits(
    q: Array,
    k: Array,
    biases: list[Array | None],
) -> Array:
    logits = _product("bmtnh,bmsnh->bmnts", q, k)
    logits *= q.shape[-1] ** -0.5
    for bias in biases:
        if bias is not None:
            logits += accumulator(bias)
    return logits


def _product(
    equation: str,
    x: Array,
    y: Array,
) -> Array:
    """Summed in at least float32; factors in one type, as a GPU's matmuls want them."""
    wide = accumulator(y).dtype
    x = x.astype(y.dtype)
    return jnp.einsum(equation, x, y, preferred_element_type=wide)
