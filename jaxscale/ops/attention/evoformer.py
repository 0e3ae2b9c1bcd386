"""The Evoformer's attention as models call it: its checks and the choice of a backend."""

import logging
from typing import Protocol

from jaxscale.kernels.evoformer_attention import api as kernel
from jaxscale.kernels.evoformer_attention import reference
from jaxscale.ops.attention import evoformer_chunked
from jaxscale.ops.device import device_refusal
from jaxscale.types import Array, InputError, check_choice, check_positive

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "chunked", "triton")
KEY_CHUNK = 32


class EvoformerAttention(Protocol):
    """What an Evoformer's modules call."""

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask_bias: Array | None = None,
        pair_bias: Array | None = None,
    ) -> Array:
        """As `evoformer_attention`."""


def evoformer_attention(
    q: Array,
    k: Array,
    v: Array,
    mask_bias: Array | None = None,
    pair_bias: Array | None = None,
    *,
    implementation: str | None = None,
    key_chunk: int = KEY_CHUNK,
) -> Array:
    """Softmax attention within each row, with a bias of the row's keys and one of all rows.

    A key whose logit is -inf is not seen. A query that sees no key has output 0, and what it adds
    to every gradient is 0. A mask of large negative numbers such as -1e9 follows the equation: if
    it lies on every key of a query, the query sees them all alike.

    Source: Song et al. 2023, DeepSpeed4Science (arXiv 2310.04610), DS4Sci_EvoformerAttention; its
        [B, N, L, H, D] is our [B, M, T, N, H]. Jumper et al. 2021, AlphaFold 2, supplement,
        algorithm 7, lines 3 to 6.
    Args:
        q: [B, M, T, N, H]: M rows of T queries.
        k, v: [B, M, S, N, H], in the type of `q`.
        mask_bias: [B, M, 1, 1, S], of any floating type; None is 0.
        pair_bias: [B, 1, N, T, S], of any floating type; None is 0.
        implementation: one of BACKENDS; None takes "chunked" and logs it. "reference" holds all
            logits [B, M, N, T, S]. "triton" is a kernel for NVIDIA GPUs since Ampere, which no GPU
            has timed yet.
        key_chunk: keys that "chunked" takes at a time; more are faster and take more memory.
    Returns:
        [B, M, T, N, H] in the type of `q`; logits, softmax and sums are in at least float32.
        It has no forward-mode derivative, and but for "reference" is differentiable once.
    Raises:
        InputError: shapes or types do not fit one another, or the backend is unknown or cannot do
            what is asked.
    Cost: "chunked" holds [B, M, N, T, key_chunk] of each of a few float32 arrays, and in the
        backward computes the logits again. "triton" holds none, and its backward computes them
        three times.
    """
    _check(q, k, v, mask_bias, pair_bias)
    check_positive("key_chunk", key_chunk)
    if implementation is None:
        implementation = "chunked"
        logger.info("evoformer attention: backend chunked for q%s k%s", q.shape, k.shape)
    check_choice("evoformer_attention", implementation, BACKENDS)
    operands = q, k, v, mask_bias, pair_bias
    if implementation == "reference":
        return reference.attend(*operands)
    if implementation == "chunked":
        return evoformer_chunked.attend(*operands, key_chunk=key_chunk)
    if reason := kernel.refusal(implementation, q) or device_refusal(implementation):
        raise InputError("evoformer_attention", implementation, reason)
    return kernel.evoformer_attention(*operands, implementation=implementation)


def _check(
    q: Array,
    k: Array,
    v: Array,
    mask_bias: Array | None,
    pair_bias: Array | None,
) -> None:
    """Raises InputError for shapes and types that do not fit."""
    shapes = f"q {q.shape}, k {k.shape} and v {v.shape}"
    is_alike = q.ndim == k.ndim == 5 and k.shape == (*q.shape[:2], k.shape[2], *q.shape[3:])
    if not is_alike or v.shape != k.shape:
        expected = "q [B, M, T, N, H], k and v [B, M, S, N, H]"
        raise InputError("evoformer_attention", shapes, expected)
    if not q.dtype == k.dtype == v.dtype:
        given = f"q {q.dtype}, k {k.dtype} and v {v.dtype}"
        raise InputError("evoformer_attention", given, "one type")
    rows, queries, heads = q.shape[1:4]
    sizes = {
        "mask_bias": (mask_bias, (q.shape[0], rows, 1, 1, k.shape[2]), "[B, M, 1, 1, S]"),
        "pair_bias": (pair_bias, (q.shape[0], 1, heads, queries, k.shape[2]), "[B, 1, N, T, S]"),
    }
    for name, (bias, shape, dims) in sizes.items():
        if bias is not None and bias.shape != shape:
            raise InputError(name, bias.shape, f"{dims} = {shape} with {shapes}")
