"""What the Triton kernels of the Evoformer's attention share: places, loads and logits of tiles.

R is the number of rows of all alignments, B times M.
"""

from typing import Any

import triton
import triton.language as tl
from jax import Array

from jaxscale.kernels.evoformer_attention.api import WIDTHS
from jaxscale.kernels.triton_call import Blocks, blocks_of
from jaxscale.kernels.triton_softmax import LEAST_ROWS


@triton.jit
def place(NUM_TILES: tl.constexpr, NUM_HEADS: tl.constexpr):
    """(tile, head, row) of a program; programs side by side are of one head, then of one row."""
    number = tl.program_id(0)
    head = number // NUM_TILES % NUM_HEADS
    return number % NUM_TILES, head, number // (NUM_TILES * NUM_HEADS)


@triton.jit
def tokens(
    row,
    head,
    token,
    LENGTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where the numbers [n] of a row's tokens begin in an array [R, LENGTH, NUM_HEADS, WIDTH]."""
    first = row.to(tl.int64) * LENGTH + token
    return (first * NUM_HEADS + head) * WIDTH


@triton.jit
def sums(row, head, query, NUM_QUERIES: tl.constexpr, NUM_HEADS: tl.constexpr):
    """Where the queries [n] of a row's head are in an array [R, NUM_HEADS, NUM_QUERIES]."""
    return (row.to(tl.int64) * NUM_HEADS + head) * NUM_QUERIES + query


@triton.jit
def pairs(
    batch,
    head,
    query,
    key,
    NUM_QUERIES: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
):
    """Where pairs of a head are in an array [B, NUM_HEADS, NUM_QUERIES, NUM_KEYS].

    Args:
        query, key: one of them as a column, the other as a row.
    """
    first = (batch.to(tl.int64) * NUM_HEADS + head) * NUM_QUERIES + query
    return first * NUM_KEYS + key


@triton.jit
def load(at, is_there, IS_WHOLE: tl.constexpr):
    """A tile, with zeros where nothing is there; all of it is if IS_WHOLE."""
    if IS_WHOLE:
        return tl.load(at)
    return tl.load(at, mask=is_there, other=0.0)


@triton.jit
def logits_of(
    product,
    mask,
    pair,
    is_key,
    is_pair,
    SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    HAS_WHOLE_QUERIES: tl.constexpr,
    HAS_WHOLE_KEYS: tl.constexpr,
):
    """Logits of a tile, -inf beyond the last key.

    They are not in powers of two: the smallest float32, which hides keys, would become -inf.

    Args:
        product: of queries and keys.
        mask, pair: where the tile's biases are, of the tile's shape or a row or column of it.
        is_key, is_pair: which of them are there.
    """
    logits = product * SCALE
    if HAS_MASK:
        logits += load(mask, is_key, HAS_WHOLE_KEYS).to(tl.float32)
    if HAS_PAIR:
        logits += load(pair, is_pair, HAS_WHOLE_QUERIES and HAS_WHOLE_KEYS).to(tl.float32)
    if not HAS_WHOLE_KEYS:
        logits = tl.where(is_key, logits, -float("inf"))
    return logits


def blocks_for(name: str, width: int) -> Blocks:
    """The block sizes of a kernel.

    Args:
        name: of the kernel. Rows are queries and columns are keys; of "key_gradients" it is the
            other way round.
        width: of a head.
    """
    of_width = min(each for each in WIDTHS if each >= width)
    return blocks_of(f"evoformer_attention.{name}.{of_width}")


def sizes_of(
    q: Array,
    k: Array,
    mask_bias: Array | None,
    pair_bias: Array | None,
    queries: int,
    keys: int,
) -> dict[str, Any]:
    """What all of the kernels are compiled for, with tiles of so many queries and keys."""
    _, num_rows, num_queries, num_heads, width = q.shape
    num_keys = k.shape[2]
    return dict(
        NUM_ROWS=num_rows,
        NUM_QUERIES=num_queries,
        NUM_KEYS=num_keys,
        NUM_HEADS=num_heads,
        WIDTH=width,
        # Tensor cores take widths that are powers of two.
        PADDED=max(LEAST_ROWS, triton.next_power_of_2(width)),
        SCALE=width**-0.5,
        HAS_MASK=mask_bias is not None,
        HAS_PAIR=pair_bias is not None,
        HAS_WHOLE_QUERIES=num_queries % queries == 0,
        HAS_WHOLE_KEYS=num_keys % keys == 0,
        QUERIES=queries,
        KEYS=keys,
    )


def pointers_of(
    q: Array,
    k: Array,
    v: Array,
    mask_bias: Array | None,
    pair_bias: Array | None,
) -> tuple[Array, ...]:
    """The arrays that a kernel gets; q stands in for a bias that is absent, and is not read."""
    mask_bias = q if mask_bias is None else mask_bias
    pair_bias = q if pair_bias is None else pair_bias
    return q, k, v, mask_bias, pair_bias
