"""Exponentials of logits for any NVIDIA GPU since Ampere, as a Triton kernel.

The kernel is the head's matmul, whose tiles end in the exponentials.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from jaxscale.kernels.triton_call import blocks_of, call
from jaxscale.kernels.triton_matmul import BAND, add_product, place
from jaxscale.kernels.triton_softmax import LOG2E

OPERATION = "linear_cross_entropy"


@triton.jit
def _exponentials(
    h,
    head,
    out,
    tops,
    sums,
    LENGTH: tl.constexpr,
    DEPTH: tl.constexpr,
    VOCABULARY: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile of tokens times one tile of the vocabulary."""
    num_columns: tl.constexpr = (VOCABULARY + COLUMNS - 1) // COLUMNS
    i, j = place(tl.program_id(0), tl.cdiv(LENGTH, ROWS), num_columns, BAND)
    row = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    row_read = tl.minimum(row, LENGTH - 1)
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    logits = add_product(
        h, head, logits, row_read, column, DEPTH,
        DEPTH, VOCABULARY, True, COLUMNS, STEP,
    )  # fmt: skip
    if VOCABULARY % COLUMNS:
        logits = tl.where((column < VOCABULARY)[None, :], logits, -float("inf"))
    top = tl.max(logits, 1)
    # A tile of forbidden words leaves -inf, and -inf - -inf would be NaN.
    safe = tl.where(top == -float("inf"), 0.0, top)
    values = tl.exp2((logits - safe[:, None]) * LOG2E)
    is_row = row < LENGTH
    tl.store(tops + j * LENGTH + row, top, mask=is_row)
    tl.store(sums + j * LENGTH + row, tl.sum(values, 1), mask=is_row)
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=is_row[:, None])


def exponentials(
    h: Array,
    head: Array,
    *,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """The exponential of each logit minus the largest of its tile.

    Args:
        h: [T, D].
        head: [V, D].
    Returns:
        (exp(logit - top) [T, V rounded up to whole tiles] in the type of `h`, 0 beyond V;
        top [tiles, T], the largest logit of each tile of columns, float32; where it is -inf, the
        exponentials are 0;
        the sum of its exponentials [tiles, T], float32).
    """
    blocks = blocks_of(OPERATION)
    length, depth = h.shape
    vocabulary = head.shape[0]
    num_columns = triton.cdiv(vocabulary, blocks.columns)
    width = num_columns * blocks.columns
    by_row = jax.ShapeDtypeStruct((num_columns, length), jnp.float32)
    return call(
        _exponentials,
        h,
        head,
        out_type=(jax.ShapeDtypeStruct((length, width), h.dtype), by_row, by_row),
        grid=(triton.cdiv(length, blocks.rows) * num_columns,),
        blocks=blocks,
        interpret=interpret,
        LENGTH=length,
        DEPTH=depth,
        VOCABULARY=vocabulary,
        WIDTH=width,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        STEP=blocks.depth,
        BAND=BAND,
    )
