"""Attention of some queries of a row over some of its keys, by the keys that each query sees.

A sequence that is seen in chunks is put together of such parts. A query's keys are the interval
`low <= s < high`, as the kernel takes it, so that documents, windows and the causal mask are alike.
"""

import dataclasses
import functools
import logging

import jax

from jaxscale.kernels.attention import api as kernel
from jaxscale.ops.attention import intervals_chunked
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.ops.attention.parts import Part
from jaxscale.ops.device import device_refusal, kernel_for
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, InputError, check_choice

logger = logging.getLogger(__name__)

BACKENDS = (*kernel.BACKENDS, "chunked")


@dataclasses.dataclass(frozen=True)
class IntervalAttention:
    """Attention over intervals of keys, forward and backward.

    Args:
        scale: factor on the logits.
        softcap: c in c * tanh(logits / c); None for none.
        implementation: one of BACKENDS.
    """

    scale: float
    softcap: float | None
    implementation: str

    # jit: the calls of all pairs of chunks share one trace.
    @functools.partial(jax.jit, static_argnums=0)
    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        low: Array,
        high: Array,
    ) -> Part:
        """Queries [B, T, N, H] over keys and values [B, S, K, H]; low and high [B or 1, T]."""
        if self.implementation == "chunked":
            return intervals_chunked.forward(q, k, v, low, high, **self._factors())
        settings = self._factors() | dict(implementation=self.implementation)
        o, lse = kernel.attention(q, k, v, low, high, **settings)
        return Part(accumulator(o), lse)

    @functools.partial(jax.jit, static_argnums=0)
    def backward(
        self,
        q: Array,
        k: Array,
        v: Array,
        do: Array,
        lse: Array,
        delta: Array,
        low: Array,
        high: Array,
    ) -> tuple[Array, Array, Array]:
        """(dq, dk, dv) in at least float32 through these keys; see `kernels.attention.gradients`.

        Args:
            q, k, v, low, high: as for `forward`.
            do: [B, T, N, H] cotangent of the output over all keys.
            lse: [B, N, T], over all keys.
            delta: [B, N, T], `row_sums` of the output over all keys and `do`.
        """
        operands = q, k, v, do, lse, delta, low, high
        if self.implementation == "chunked":
            return intervals_chunked.backward(*operands, **self._factors())
        settings = self._factors() | dict(implementation=self.implementation)
        dq, dk, dv = map(accumulator, kernel.gradients(*operands, **settings))
        return dq, dk, dv

    def _factors(self) -> dict[str, float | None]:
        return dict(scale=self.scale, softcap=self.softcap)


row_sums = kernel.row_sums


def attention_over_intervals(
    q: Array,
    context: AttentionContext,
    *,
    implementation: str | None = None,
) -> IntervalAttention:
    """Attention with a context's scale and soft-cap; its mask is in the intervals.

    Args:
        q: some of the queries, whose shape and type are asked for.
        context: the mask structure.
        implementation: one of BACKENDS; None picks one and logs it. "reference" holds the logits
            of all queries and keys that it is given, "chunked" those of a block.
    Raises:
        InputError: the backend is unknown or cannot do what is asked.
    """
    if not context.is_causal or context.layout is not None:
        given = "is_causal = False or a layout of blocks"
        raise InputError("AttentionContext", given, "a causal mask without layout of blocks")
    if implementation is None:
        implementation = kernel_for(kernel, q, q) or "chunked"
        logger.info("chunks' attention: backend %s for q%s %s", implementation, q.shape, q.dtype)
    check_choice("ExecutionConfig.attention", implementation, BACKENDS)
    if reason := _refusal(implementation, q):
        raise InputError("ExecutionConfig.attention", implementation, reason)
    return IntervalAttention(context.logits_scale(q.shape[3]), context.softcap, implementation)


def _refusal(implementation: str, q: Array) -> str | None:
    if implementation == "chunked":
        return None
    return kernel.refusal(implementation, q, q) or device_refusal(implementation)
