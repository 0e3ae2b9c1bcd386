"""The gradients of the Evoformer's keys, values and mask bias as a Triton kernel.

A program takes a tile of one row's keys and goes over all queries of the row.

Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), algorithm 2.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from jaxscale.kernels.evoformer_attention.triton_tiles import (
    blocks_for,
    load,
    logits_of,
    pairs,
    place,
    pointers_of,
    sizes_of,
    sums,
    tokens,
)
from jaxscale.kernels.triton_call import call


@triton.jit
def _key_gradients(
    q,
    k,
    v,
    mask,
    pair,
    do,
    tops,
    totals,
    deltas,
    dk,
    dv,
    dmask,
    NUM_ROWS: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    HAS_WHOLE_QUERIES: tl.constexpr,
    HAS_WHOLE_KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of one tile of keys of one head; logits and their gradients are [keys, queries]."""
    tile, head, row = place(tl.cdiv(NUM_KEYS, KEYS), NUM_HEADS)
    key = tile * KEYS + tl.arange(0, KEYS)
    query, h = tl.arange(0, QUERIES), tl.arange(0, PADDED)
    is_key, is_width = key < NUM_KEYS, h < WIDTH
    is_q_whole: tl.constexpr = HAS_WHOLE_QUERIES and WIDTH == PADDED
    stride: tl.constexpr = QUERIES * NUM_HEADS * WIDTH
    of_keys = tokens(row, head, key, NUM_KEYS, NUM_HEADS, WIDTH)[:, None] + h[None, :]
    is_k = is_key[:, None] & is_width[None, :]
    k_tile = tl.load(k + of_keys, mask=is_k, other=0.0)
    v_tile = tl.load(v + of_keys, mask=is_k, other=0.0)
    of_queries = tokens(row, head, query, NUM_QUERIES, NUM_HEADS, WIDTH)[:, None] + h[None, :]
    q += of_queries
    do += of_queries
    of_sums = sums(row, head, query, NUM_QUERIES, NUM_HEADS)
    tops += of_sums
    totals += of_sums
    deltas += of_sums
    mask += row.to(tl.int64) * NUM_KEYS + key[:, None]
    pair += pairs(
        row // NUM_ROWS, head, query[None, :], key[:, None], NUM_QUERIES, NUM_KEYS, NUM_HEADS
    )
    dk_tile = tl.zeros((KEYS, PADDED), tl.float32)
    dv_tile = tl.zeros((KEYS, PADDED), tl.float32)
    dmask_tile = tl.zeros((KEYS,), tl.float32)
    for first in range(0, NUM_QUERIES, QUERIES):
        is_query = first + query < NUM_QUERIES
        is_q = is_query[:, None] & is_width[None, :]
        q_tile = load(q, is_q, is_q_whole)
        logits = logits_of(
            tl.dot(k_tile, tl.trans(q_tile)), mask, pair,
            is_key[:, None], is_key[:, None] & is_query[None, :],
            SCALE, HAS_MASK, HAS_PAIR, HAS_WHOLE_QUERIES, HAS_WHOLE_KEYS,
        )  # fmt: skip
        # Beyond the last query all weights are 0.
        top = tl.load(tops, mask=is_query, other=float("inf"))
        inverse = 1 / tl.load(totals, mask=is_query, other=1.0)
        weights = tl.exp(logits - top[None, :]) * inverse[None, :]
        do_tile = load(do, is_q, is_q_whole)
        dv_tile = tl.dot(weights.to(do_tile.dtype), do_tile, dv_tile)
        dweights = tl.dot(v_tile, tl.trans(do_tile))
        delta = tl.load(deltas, mask=is_query, other=0.0)
        dlogits = weights * (dweights - delta[None, :])
        dk_tile = tl.dot(dlogits.to(q_tile.dtype), q_tile, dk_tile)
        if HAS_MASK:
            dmask_tile += tl.sum(dlogits, 1)
        q += stride
        do += stride
        tops += QUERIES
        totals += QUERIES
        deltas += QUERIES
        pair += QUERIES * NUM_KEYS
    tl.store(dk + of_keys, (dk_tile * SCALE).to(dk.dtype.element_ty), mask=is_k)
    tl.store(dv + of_keys, dv_tile.to(dv.dtype.element_ty), mask=is_k)
    if HAS_MASK:
        tl.store(dmask + sums(row, head, key, NUM_KEYS, NUM_HEADS), dmask_tile, mask=is_key)


def key_gradients(
    operands: tuple[Array | None, ...],
    do: Array,
    top: Array,
    total: Array,
    delta: Array,
    *,
    interpret: Any = False,
) -> tuple[Array, Array, Array | None]:
    """Gradients of k, v and the mask bias, which is None where that is absent.

    Each head writes its part of the mask bias's gradient, and the parts are added up afterwards: no
    sum depends on the order in which programs end.

    Args:
        operands, do, top, total, delta, interpret: as those of `triton_backward.backward`.
    """
    q, k, _, mask_bias, pair_bias = operands
    batch, num_rows, num_keys, num_heads, width = k.shape
    blocks = blocks_for("key_gradients", width)
    num_tiles = triton.cdiv(num_keys, blocks.rows)
    like_k = jax.ShapeDtypeStruct(k.shape, k.dtype)
    by_head = (1,) if mask_bias is None else (batch, num_rows, num_heads, num_keys)
    dk, dv, dmask = call(
        _key_gradients,
        *pointers_of(*operands),
        *(do, top, total, delta),
        out_type=(like_k, like_k, jax.ShapeDtypeStruct(by_head, jnp.float32)),
        grid=(num_tiles * num_heads * num_rows * batch,),
        blocks=blocks,
        interpret=interpret,
        **sizes_of(q, k, mask_bias, pair_bias, blocks.columns, blocks.rows),
    )
    if mask_bias is None:
        return dk, dv, None
    return dk, dv, dmask.sum(2).reshape(mask_bias.shape).astype(mask_bias.dtype)
