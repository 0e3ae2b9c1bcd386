"""The online softmax that the Triton attention kernels share; exponents are in powers of two.

Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

import math

import triton
import triton.language as tl

LEAST_ROWS = 16  # of a product of tensor cores
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def capped(logits, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """(logits or their tanh, what they are to be multiplied by to be exponents of two)."""
    if SOFTCAP > 0:
        x = logits * (SCALE / SOFTCAP)
        # tanh(x), which Triton has not.
        logits = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E)))
    multiplier: tl.constexpr = SOFTCAP if SOFTCAP > 0 else SCALE
    factor: tl.constexpr = multiplier * LOG2E
    return logits, factor


@triton.jit
def softmax_step(logits, factor, total, top, IS_MASKED: tl.constexpr):
    """One step over a tile of keys.

    Args:
        logits: [rows, keys], -inf where a key is not seen; only if IS_MASKED.
        factor: makes them exponents.
        total: [rows] the sum of the exponentials so far, relative to `top`.
        top: [rows] the largest exponent so far.
    Returns:
        (exponentials [rows, keys], what the sums of before shrink by [rows], total, top).
    """
    top_of_tile = tl.max(logits, 1) * factor
    new_top = tl.maximum(top, top_of_tile)
    # Where nothing is seen yet, -inf - -inf would be NaN.
    shift = tl.where(new_top == -float("inf"), 0.0, new_top) if IS_MASKED else new_top
    p = tl.exp2(logits * factor - shift[:, None])
    shrink = tl.exp2(top - shift)
    new_total = total * shrink + tl.sum(p, 1)
    return p, shrink, new_total, new_top
