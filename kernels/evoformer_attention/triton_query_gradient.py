"""The gradient of the Evoformer's queries for any NVIDIA GPU since Ampere, as a Triton kernel.

A program takes a tile of one row's queries and goes over all keys of the row.

Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), algorithm 2.
"""

from typing import Any

import jax
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
def _query_gradient(
    q,
    k,
    v,
    mask,
    pair,
    do,
    tops,
    totals,
    deltas,
    dq,
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
    """Gradient of one tile of queries of one head."""
    tile, head, row = place(tl.cdiv(NUM_QUERIES, QUERIES), NUM_HEADS)
    query = tile * QUERIES + tl.arange(0, QUERIES)
    key, h = tl.arange(0, KEYS), tl.arange(0, PADDED)
    is_query, is_width = query < NUM_QUERIES, h < WIDTH
    is_k_whole: tl.constexpr = HAS_WHOLE_KEYS and WIDTH == PADDED
    stride: tl.constexpr = KEYS * NUM_HEADS * WIDTH
    of_queries = tokens(row, head, query, NUM_QUERIES, NUM_HEADS, WIDTH)[:, None] + h[None, :]
    is_q = is_query[:, None] & is_width[None, :]
    q_tile = tl.load(q + of_queries, mask=is_q, other=0.0)
    do_tile = tl.load(do + of_queries, mask=is_q, other=0.0)
    of_sums = sums(row, head, query, NUM_QUERIES, NUM_HEADS)
    # Beyond the last query all weights are 0.
    top = tl.load(tops + of_sums, mask=is_query, other=float("inf"))
    inverse = 1 / tl.load(totals + of_sums, mask=is_query, other=1.0)
    delta = tl.load(deltas + of_sums, mask=is_query, other=0.0)
    of_keys = tokens(row, head, key, NUM_KEYS, NUM_HEADS, WIDTH)[None, :] + h[:, None]
    k += of_keys
    v += of_keys
    mask += row.to(tl.int64) * NUM_KEYS + key[None, :]
    pair += pairs(
        row // NUM_ROWS, head, query[:, None], key[None, :], NUM_QUERIES, NUM_KEYS, NUM_HEADS
    )
    dq_tile = tl.zeros((QUERIES, PADDED), tl.float32)
    for first in range(0, NUM_KEYS, KEYS):
        is_key = first + key < NUM_KEYS
        is_k = is_key[None, :] & is_width[:, None]
        k_tile = load(k, is_k, is_k_whole)
        logits = logits_of(
            tl.dot(q_tile, k_tile), mask, pair,
            is_key[None, :], is_query[:, None] & is_key[None, :],
            SCALE, HAS_MASK, HAS_PAIR, HAS_WHOLE_QUERIES, HAS_WHOLE_KEYS,
        )  # fmt: skip
        weights = tl.exp(logits - top[:, None]) * inverse[:, None]
        v_tile = load(v, is_k, is_k_whole)
        dlogits = weights * (tl.dot(do_tile, v_tile) - delta[:, None])
        dq_tile = tl.dot(dlogits.to(k_tile.dtype), tl.trans(k_tile), dq_tile)
        k += stride
        v += stride
        mask += KEYS
        pair += KEYS
    tl.store(dq + of_queries, (dq_tile * SCALE).to(dq.dtype.element_ty), mask=is_q)


def query_gradient(
    operands: tuple[Array | None, ...],
    do: Array,
    top: Array,
    total: Array,
    delta: Array,
    *,
    interpret: Any = False,
) -> Array:
    """Gradient of q; arguments as those of `triton_backward.backward`."""
    q, k, _, mask_bias, pair_bias = operands
    batch, num_rows, num_queries, num_heads, width = q.shape
    blocks = blocks_for("query_gradient", width)
    num_tiles = triton.cdiv(num_queries, blocks.rows)
    (dq,) = call(
        _query_gradient,
        *pointers_of(*operands),
        *(do, top, total, delta),
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(num_tiles * num_heads * num_rows * batch,),
        blocks=blocks,
        interpret=interpret,
        **sizes_of(q, k, mask_bias, pair_bias, blocks.rows, blocks.columns),
    )
    return dq
