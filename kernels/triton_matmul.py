"""The matmul that several Triton kernels share."""

import triton
import triton.language as tl

BAND = 8  # tiles of rows in a band


@triton.jit
def place(number, num_rows, num_columns, BAND: tl.constexpr):
    """(row, column) of the `number`-th tile of a grid of tiles, band after band of BAND rows.

    Programs that run side by side share columns in the L2 cache.
    """
    first = number // (BAND * num_columns) * BAND
    height = min(num_rows - first, BAND)
    within = number % (BAND * num_columns)
    return first + within % height, within // height


@triton.jit
def add_product(
    left,
    right,
    accumulator,
    row,
    column,
    depth,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Adds a tile of left times right to the accumulator [rows, COLUMNS].

    Args:
        left: points to [rows, DEPTH].
        right: points to [DEPTH, WIDTH], or [WIDTH, DEPTH] where IS_TRANSPOSED.
        row, column: those of the tile; columns may lie beyond WIDTH.
        depth: DEPTH, or 0 for no product.
        STEP: elements of the contraction at a time.
    """
    k = tl.arange(0, STEP)
    left += row.to(tl.int64)[:, None] * DEPTH + k[None, :]
    if IS_TRANSPOSED:
        # A vocabulary times a model's width may be 2^31 and more.
        right += column.to(tl.int64)[None, :] * DEPTH + k[:, None]
    else:
        right += k[:, None] * WIDTH + column[None, :]
    is_column = (column < WIDTH)[None, :]
    for first in range(0, depth, STEP):
        if DEPTH % STEP:
            is_depth = first + k < DEPTH
            a = tl.load(left, mask=is_depth[None, :], other=0.0)
            b = tl.load(right, mask=is_depth[:, None] & is_column, other=0.0)
        elif WIDTH % COLUMNS:
            a = tl.load(left)
            b = tl.load(right, mask=is_column, other=0.0)
        else:
            a = tl.load(left)
            b = tl.load(right)
        accumulator = tl.dot(a, b, accumulator)
        left += STEP
        right += STEP if IS_TRANSPOSED else STEP * WIDTH
    return accumulator
