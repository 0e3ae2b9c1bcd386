"""The forward of the Evoformer's attention for any NVIDIA GPU since Ampere, as a Triton kernel.

A program takes a tile of one row's queries and goes over all keys of the row.

Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), algorithm 1.
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
def _forward(
    q,
    k,
    v,
    mask,
    pair,
    o,
    tops,
    totals,
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
    """Attention of one tile of queries of one head."""
    tile, head, row = place(tl.cdiv(NUM_QUERIES, QUERIES), NUM_HEADS)
    query = tile * QUERIES + tl.arange(0, QUERIES)
    key, h = tl.arange(0, KEYS), tl.arange(0, PADDED)
    is_query, is_width = query < NUM_QUERIES, h < WIDTH
    is_k_whole: tl.constexpr = HAS_WHOLE_KEYS and WIDTH == PADDED
    stride: tl.constexpr = KEYS * NUM_HEADS * WIDTH
    of_queries = tokens(row, head, query, NUM_QUERIES, NUM_HEADS, WIDTH)[:, None] + h[None, :]
    is_q = is_query[:, None] & is_width[None, :]
    q_tile = tl.load(q + of_queries, mask=is_q, other=0.0)
    of_keys = tokens(row, head, key, NUM_KEYS, NUM_HEADS, WIDTH)
    k += of_keys[None, :] + h[:, None]
    v += of_keys[:, None] + h[None, :]
    mask += row.to(tl.int64) * NUM_KEYS + key[None, :]
    pair += pairs(
        row // NUM_ROWS, head, query[:, None], key[None, :], NUM_QUERIES, NUM_KEYS, NUM_HEADS
    )
    o_tile = tl.zeros((QUERIES, PADDED), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    for first in range(0, NUM_KEYS, KEYS):
        is_key = first + key < NUM_KEYS
        k_tile = load(k, is_key[None, :] & is_width[:, None], is_k_whole)
        logits = logits_of(
            tl.dot(q_tile, k_tile), mask, pair,
            is_key[None, :], is_query[:, None] & is_key[None, :],
            SCALE, HAS_MASK, HAS_PAIR, HAS_WHOLE_QUERIES, HAS_WHOLE_KEYS,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(logits, 1))
        # Of a query that has seen no key yet the largest logit is -inf; -inf - -inf would be NaN.
        finite = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp(logits - finite[:, None])
        shrink = tl.exp(top - finite)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = load(v, is_key[:, None] & is_width[None, :], is_k_whole)
        o_tile = tl.dot(weights.to(v_tile.dtype), v_tile, o_tile * shrink[:, None])
        top = new_top
        k += stride
        v += stride
        mask += KEYS
        pair += KEYS
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.where(total == 0, 1.0, total)
    o_tile = o_tile / total[:, None]
    tl.store(o + of_queries, o_tile.to(o.dtype.element_ty), mask=is_q)
    of_sums = sums(row, head, query, NUM_QUERIES, NUM_HEADS)
    tl.store(tops + of_sums, top, mask=is_query)
    tl.store(totals + of_sums, total, mask=is_query)


def forward(
    q: Array,
    k: Array,
    v: Array,
    mask_bias: Array | None,
    pair_bias: Array | None,
    *,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """Attention, and what the backward needs of each query's logits.

    The largest logit and the denominator are kept apart: a mask of -1e9 on every key would round
    the denominator's logarithm away in their sum.

    Args:
        q, k, v, mask_bias, pair_bias: as for `api.evoformer_attention`.
        interpret: as for `triton_call.call`.
    Returns:
        (o [B, M, T, N, H] in the type of `q`;
        largest logit [B, M, N, T] float32, 0 where a query sees nothing;
        sum of the exponentials of what the logits are below it [B, M, N, T] float32, there 1).
    """
    batch, num_rows, num_queries, num_heads, width = q.shape
    blocks = blocks_for("forward", width)
    o_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
    sum_type = jax.ShapeDtypeStruct((batch, num_rows, num_heads, num_queries), jnp.float32)
    num_tiles = triton.cdiv(num_queries, blocks.rows)
    return call(
        _forward,
        *pointers_of(q, k, v, mask_bias, pair_bias),
        out_type=(o_type, sum_type, sum_type),
        grid=(num_tiles * num_heads * num_rows * batch,),
        blocks=blocks,
        interpret=interpret,
        **sizes_of(q, k, mask_bias, pair_bias, blocks.rows, blocks.columns),
    )
