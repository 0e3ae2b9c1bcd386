"""Attention of some queries of a row over some of its keys, by the keys that each query sees.

A sequence that is seen in chunks is put together of such parts. A query's keys are the interval
`low <= s < high`, as the kernel takes it, so that documents, windows and the causal mask are alike.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp

from jaxscale.kernels.attention import api as kernel
from jaxscale.ops.attention.context import AttentionContext
from jaxscale.ops.device import device_refusal, kernel_for
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, InputError, check_choice

logger = logging.getLogger(__name__)

BACKENDS = kernel.BACKENDS


@functools.partial(jax.tree_util.register_dataclass, data_fields=["o", "lse"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Part:
    """What some queries made of the keys that they have seen so far.

    Args:
        o: [B, T, N, H], the softmax over these keys alone, in at least float32.
        lse: [B, N, T] log sum exp of their logits; -inf for a query that saw none.
    """

    o: Array
    lse: Array

    def __add__(self, other: "Part") -> "Part":
        """Over the keys of both.

        Source: Dao 2023 (arXiv 2307.08691), section 3.1.1; the larger lse is taken out of both
            exponentials, so that none overflows.
        """
        lse = jnp.logaddexp(self.lse, other.lse)
        o = _share(self.lse, lse) * self.o + _share(other.lse, lse) * other.o
        return Part(o, lse)


def _share(lse: Array, total: Array) -> Array:
    """[B, T, N, 1] what part of the whole softmax lies in one part's keys; 0 where all saw none."""
    share = jnp.exp(lse - jnp.where(total == -jnp.inf, 0, total))  # -inf - -inf would be NaN
    return jnp.moveaxis(share, 1, 2)[..., None]


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
        o, lse = kernel.attention(q, k, v, low, high, **dataclasses.asdict(self))
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
        settings = dataclasses.asdict(self)
        found = kernel.gradients(q, k, v, do, lse, delta, low, high, **settings)
        dq, dk, dv = map(accumulator, found)
        return dq, dk, dv


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
        implementation: as of `attention`; "chunked" is "reference" here, which sees a chunk anyway.
            None picks one and logs it.
    Raises:
        InputError: the backend is unknown or cannot do what is asked.
    """
    if not context.is_causal or context.layout is not None:
        given = "is_causal = False or a layout of blocks"
        raise InputError("AttentionContext", given, "a causal mask without layout of blocks")
    if implementation is None:
        implementation = kernel_for(kernel, q, q) or "reference"
        logger.info("chunks' attention: backend %s for q%s %s", implementation, q.shape, q.dtype)
    elif implementation == "chunked":
        implementation = "reference"
    check_choice("ExecutionConfig.attention", implementation, BACKENDS)
    if reason := kernel.refusal(implementation, q, q) or device_refusal(implementation):
        raise InputError("ExecutionConfig.attention", implementation, reason)
    return IntervalAttention(context.logits_scale(q.shape[3]), context.softcap, implementation)
