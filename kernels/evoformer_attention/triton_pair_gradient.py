"""The gradient of the Evoformer's pair bias for any NVIDIA GPU since Ampere, as a Triton kernel.

A program takes a tile of queries and keys and goes over rows, of which each adds its logits'
gradients. The logits are computed once more, which spares the programs of rows to add them up in
memory: two of nine products of the backward, and the same bits from run to run.
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
    pairs,
    pointers_of,
    sizes_of,
    sums,
    tokens,
)
from jaxscale.kernels.triton_call import call

# There are few tiles, and many rows: 128 tiles of 64 x 64 for 8 heads and 256 residues, which is
# less than one for each multiprocessor of a large GPU. So the rows of a tile are divided among
# programs until there are about this many, whatever the GPU: the sums are the same on each.
PROGRAMS = 1024


@triton.jit
def _pair_gradient(
    q,
    k,
    v,
    mask,
    pair,
    do,
    tops,
    totals,
    deltas,
    dpair,
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
    PART: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """Gradient of one tile of pairs of one head that comes from PART rows or fewer."""
    query_tiles: tl.constexpr = (NUM_QUERIES + QUERIES - 1) // QUERIES
    key_tiles: tl.constexpr = (NUM_KEYS + KEYS - 1) // KEYS
    number = tl.program_id(0)
    tile = number % (query_tiles * key_tiles)
    number = number // (query_tiles * key_tiles)
    head = number % NUM_HEADS
    part = number // NUM_HEADS % NUM_PARTS
    batch = number // (NUM_HEADS * NUM_PARTS)
    query = tile % query_tiles * QUERIES + tl.arange(0, QUERIES)
    key = tile // query_tiles * KEYS + tl.arange(0, KEYS)
    h = tl.arange(0, PADDED)
    is_query, is_key, is_width = query < NUM_QUERIES, key < NUM_KEYS, h < WIDTH
    is_q = is_query[:, None] & is_width[None, :]
    is_k = is_width[:, None] & is_key[None, :]
    is_pair = is_query[:, None] & is_key[None, :]
    is_q_whole: tl.constexpr = HAS_WHOLE_QUERIES and WIDTH == PADDED
    is_k_whole: tl.constexpr = HAS_WHOLE_KEYS and WIDTH == PADDED
    begin = part * PART
    end = tl.minimum(begin + PART, NUM_ROWS)
    row = batch * NUM_ROWS + begin
    of_queries = tokens(row, head, query, NUM_QUERIES, NUM_HEADS, WIDTH)[:, None] + h[None, :]
    q += of_queries
    do += of_queries
    of_keys = tokens(row, head, key, NUM_KEYS, NUM_HEADS, WIDTH)[None, :] + h[:, None]
    k += of_keys
    v += of_keys
    mask += row.to(tl.int64) * NUM_KEYS + key
    of_sums = sums(row, head, query, NUM_QUERIES, NUM_HEADS)
    tops += of_sums
    totals += of_sums
    deltas += of_sums
    of_pairs = pairs(batch, head, query[:, None], key[None, :], NUM_QUERIES, NUM_KEYS, NUM_HEADS)
    bias = tl.load(pair + of_pairs, mask=is_pair, other=-float("inf")).to(tl.float32)
    dpair_tile = tl.zeros((QUERIES, KEYS), tl.float32)
    for _ in range(begin, end):
        q_tile = load(q, is_q, is_q_whole)
        k_tile = load(k, is_k, is_k_whole)
        logits = tl.dot(q_tile, k_tile) * SCALE
        if HAS_MASK:
            logits += load(mask, is_key, HAS_WHOLE_KEYS).to(tl.float32)[None, :]
        logits += bias
        top = tl.load(tops, mask=is_query, other=0.0)
        inverse = 1 / tl.load(totals, mask=is_query, other=1.0)
        weights = tl.exp(logits - top[:, None]) * inverse[:, None]
        do_tile = load(do, is_q, is_q_whole)
        v_tile = load(v, is_k, is_k_whole)
        delta = tl.load(deltas, mask=is_query, other=0.0)
        dpair_tile += weights * (tl.dot(do_tile, v_tile) - delta[:, None])
        q += NUM_QUERIES * NUM_HEADS * WIDTH
        do += NUM_QUERIES * NUM_HEADS * WIDTH
        k += NUM_KEYS * NUM_HEADS * WIDTH
        v += NUM_KEYS * NUM_HEADS * WIDTH
        mask += NUM_KEYS
        tops += NUM_HEADS * NUM_QUERIES
        totals += NUM_HEADS * NUM_QUERIES
        deltas += NUM_HEADS * NUM_QUERIES
    num_batches = tl.num_programs(0) // (query_tiles * key_tiles * NUM_HEADS * NUM_PARTS)
    of_part = pairs(
        part * num_batches + batch, head, query[:, None], key[None, :],
        NUM_QUERIES, NUM_KEYS, NUM_HEADS,
    )  # fmt: skip
    tl.store(dpair + of_part, dpair_tile, mask=is_pair)


def pair_gradient(
    operands: tuple[Array | None, ...],
    do: Array,
    top: Array,
    total: Array,
    delta: Array,
    *,
    interpret: Any = False,
) -> Array:
    """Gradient of the pair bias, which is there; arguments as those of `triton_backward.backward`.

    Each part of the rows writes an array of its own, and these are added up afterwards.
    """
    q, k, _, mask_bias, pair_bias = operands
    batch, num_rows, num_queries, num_heads, width = q.shape
    num_keys = k.shape[2]
    blocks = blocks_for("pair_gradient", width)
    num_tiles = triton.cdiv(num_queries, blocks.rows) * triton.cdiv(num_keys, blocks.columns)
    num_programs = num_tiles * num_heads * batch
    part = triton.cdiv(num_rows, triton.cdiv(PROGRAMS, num_programs))
    num_parts = triton.cdiv(num_rows, part)
    by_part = (num_parts, batch, num_heads, num_queries, num_keys)
    (dpair,) = call(
        _pair_gradient,
        *pointers_of(*operands),
        *(do, top, total, delta),
        out_type=(jax.ShapeDtypeStruct(by_part, jnp.float32),),
        grid=(num_programs * num_parts,),
        blocks=blocks,
        interpret=interpret,
        **sizes_of(q, k, mask_bias, pair_bias, blocks.rows, blocks.columns),
        PART=part,
        NUM_PARTS=num_parts,
    )
    return dpair.sum(0).reshape(pair_bias.shape).astype(pair_bias.dtype)
