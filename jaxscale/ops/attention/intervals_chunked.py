"""The reference of attention over intervals, some queries and some keys at a time, on any device.

Blocks of keys that no query of a block sees are passed over.
"""

import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.attention import reference
from jaxscale.ops.attention.blocks import joined, padded, split
from jaxscale.ops.attention.parts import Part
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array

BLOCK = 512  # queries, and keys, whose logits exist at a time


def forward(
    q: Array,
    k: Array,
    v: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None,
) -> Part:
    """As `IntervalAttention.forward`, with logits of [B, N, BLOCK, BLOCK]; it has no derivative.

    Source: Dao et al. 2022, FlashAttention (arXiv 2205.14135), algorithm 2, in whose place of
        running sums parts are added.
    """
    if _is_one_block(q, k):
        wide = map(accumulator, (q, k, v))
        o, lse = reference.attention(*wide, low, high, scale=scale, softcap=softcap)
        return Part(o, lse)
    keys = _Keys(k, v)

    def of_queries(block: tuple[Array, Array, Array]) -> Part:
        q, low, high = block
        q = accumulator(q)

        def add(number: Array, part: Part) -> Part:
            here = keys.block(number, low, high)
            o, lse = reference.attention(q, *here, scale=scale, softcap=softcap)
            return part + Part(o, lse)

        by_head = jnp.moveaxis(q[..., 0], 1, 2)
        nothing = Part(
            o=jnp.zeros_like(q),
            lse=jnp.full_like(by_head, -jnp.inf),
        )
        first, end = keys.span(low, high)
        return lax.fori_loop(first, end, add, nothing)

    length = q.shape[1]
    size = min(BLOCK, length)
    blocks = tuple(split(x, 1, size) for x in (q, low, high))
    parts = lax.map(of_queries, blocks)
    o = joined(parts.o, 1, length)
    lse = joined(parts.lse, 2, length)
    return Part(o, lse)


def backward(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Array, Array, Array]:
    """As `IntervalAttention.backward`, with logits of [B, N, BLOCK, BLOCK].

    Source: Dao et al. 2022, FlashAttention (arXiv 2205.14135), algorithm 4.
    """
    if _is_one_block(q, k):
        operands = accumulator(q), accumulator(k), accumulator(v), do, lse, delta, low, high
        return reference.gradients(*operands, scale=scale, softcap=softcap)
    keys = _Keys(k, v)

    def of_queries(
        sums: tuple[Array, Array],
        block: tuple[Array, ...],
    ) -> tuple[tuple[Array, Array], Array]:
        q, do, low, high, lse, delta = block

        def add(
            number: Array,
            sums: tuple[Array, Array, Array],
        ) -> tuple[Array, Array, Array]:
            k, v, *seen = keys.block(number, low, high)
            operands = q, k, v, do, lse, delta, *seen
            more = reference.gradients(*operands, scale=scale, softcap=softcap)
            dq, dk, dv = sums
            dq += more[0]
            dk = keys.add(number, dk, more[1])
            dv = keys.add(number, dv, more[2])
            return dq, dk, dv

        dk, dv = sums
        dq = jnp.zeros_like(accumulator(q))
        first, end = keys.span(low, high)
        dq, dk, dv = lax.fori_loop(first, end, add, (dq, dk, dv))
        return (dk, dv), dq

    length, num_keys = q.shape[1], k.shape[1]
    size = min(BLOCK, length)
    by_token = [split(x, 1, size) for x in (q, do, low, high)]
    by_head = [split(x, 2, size) for x in (lse, delta)]
    blocks = (*by_token, *by_head)
    (dk, dv), dq = lax.scan(of_queries, keys.zeros(), blocks)
    return joined(dq, 1, length), dk[:, :num_keys], dv[:, :num_keys]


def _is_one_block(q: Array, k: Array) -> bool:
    """Whether the reference needs no loop around it."""
    return max(q.shape[1], k.shape[1]) <= BLOCK


class _Keys:
    """Keys and values [B, S, K, H], of which a block is taken at a time."""

    def __init__(self, k: Array, v: Array):
        self.size = min(BLOCK, k.shape[1])
        # Keys that fill a block are in no interval. Queries that do have empty ones.
        self.k = padded(k, 1, self.size)
        self.v = padded(v, 1, self.size)

    def span(self, low: Array, high: Array) -> tuple[Array, Array]:
        """The first block that any of the queries sees, and the one after the last."""
        from_low = jnp.where(low < high, low, self.k.shape[1])
        first = jnp.min(from_low) // self.size
        end = -(-jnp.max(high) // self.size)
        return first, end

    def block(
        self,
        number: Array,
        low: Array,
        high: Array,
    ) -> tuple[Array, Array, Array, Array]:
        """(k, v, low, high) of a block in at least float32; intervals count from its first key."""
        start = number * self.size
        k = lax.dynamic_slice_in_dim(self.k, start, self.size, axis=1)
        v = lax.dynamic_slice_in_dim(self.v, start, self.size, axis=1)
        return accumulator(k), accumulator(v), low - start, high - start

    def zeros(self) -> tuple[Array, Array]:
        """Sums for the gradients of all keys and values."""
        zeros = jnp.zeros_like(accumulator(self.k))
        return zeros, zeros

    def add(
        self,
        number: Array,
        whole: Array,
        block: Array,
    ) -> Array:
        """The gradient of all keys or values, to which that of a block is added."""
        start = number * self.size
        before = lax.dynamic_slice_in_dim(whole, start, self.size, axis=1)
        return lax.dynamic_update_slice_in_dim(whole, before + block, start, axis=1)
