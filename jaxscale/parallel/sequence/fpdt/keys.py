"""The keys and values of the chunks so far, and the attention of the next chunk over them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxscale.ops.attention.intervals import IntervalAttention
from jaxscale.ops.attention.parts import Part
from jaxscale.parallel.sequence.fpdt.cuts import fetch, put, tied
from jaxscale.types import Array


class Intervals(NamedTuple):
    """The keys that each token sees, low <= s < high, in the order of the sequence.

    Args:
        low, high: [B or 1, T] int32.
    """

    low: Array
    high: Array

    def of(self, queries: int, size: int) -> "Intervals":
        """Those of a chunk of `size` queries."""

        start = queries * size

        def one(x: Array) -> Array:
            return lax.slice_in_dim(x, start, start + size, axis=1)

        return Intervals(one(self.low), one(self.high))

    def over(
        self,
        queries: int,
        keys: int,
        size: int,
    ) -> "Intervals":
        """Those of a chunk's queries, counted from the first key of a chunk of keys."""
        first = keys * size

        def one(x: Array) -> Array:
            return jnp.clip(x - first, 0, size)

        low, high = self.of(queries, size)
        return Intervals(one(low), one(high))


class Keys:
    """Keys and values of the chunks so far, which rest on the host or on the device.

    On the device they lie in one array, so that a chunk's queries see all of them in one call of
    the kernel. From the host they come one chunk at a time: while one is attended the next is on
    its way.

    Args:
        attention: of the chunks.
        num: chunks of the sequence.
        place: "device" or "host".
    """

    def __init__(
        self,
        attention: IntervalAttention,
        num: int,
        place: str,
    ):
        self.attention = attention
        self.num = num
        self.place = place
        self.kept = []

    def attend(
        self,
        number: int,
        q: Array,
        kv: list[Array],
        intervals: Intervals,
    ) -> Part:
        """The queries of a chunk over its own keys and values and those of all chunks before.

        Args:
            number: of the chunk; all before have been attended.
            q: [B, C, N, H].
            kv: [B, C, K, H] each.
            intervals: of the whole sequence.
        """
        size = q.shape[1]
        if self.place == "device":
            self.add(number, kv)
            seen = intervals.of(number, size)
            return self.attention.forward(q, *self.kept, *seen)
        coming = None
        if number:
            coming, q = fetch(self.place, self.kept[0], q)
        # Its own keys come first. Every token sees itself, so no sum is empty.
        seen = intervals.over(number, number, size)
        part = self.attention.forward(q, *kv, *seen)
        for i in range(number):
            q, part = tied((q, part))
            here = coming
            if i + 1 < number:
                coming, q = fetch(self.place, self.kept[i + 1], q)
            seen = intervals.over(number, i, size)
            part += self.attention.forward(q, *here, *seen)
        # As one array, of which one copy is in flight.
        self.kept.append(put(self.place, jnp.stack(kv)))
        return part

    def add(self, number: int, kv: list[Array]) -> None:
        """Writes a chunk's keys and values into those of the sequence, on the device.

        Keys that no chunk has written yet are seen by none of the queries.
        """

        def empty(x: Array) -> Array:
            num_rows, size, *heads = x.shape
            return jnp.zeros((num_rows, self.num * size, *heads), x.dtype)

        def add(whole: Array, x: Array) -> Array:
            first = number * x.shape[1]
            return lax.dynamic_update_slice_in_dim(whole, x, first, axis=1)

        before = self.kept or map(empty, kv)
        self.kept = list(map(add, before, kv))
