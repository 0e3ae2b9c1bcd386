"""The backward of a layer whose keys lie on the device.

It goes from the last chunk of queries to the first. A chunk of queries meets all its keys in one
call of the kernel, and waits nowhere before or after that. The keys of a chunk are seen last by the
queries of the same chunk, so that the gradients of its queries, keys and values are complete
together, as they are in `by_keys`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.parallel.sequence.fpdt.backward import Backward, zeros
from jaxscale.parallel.sequence.fpdt.cuts import tied
from jaxscale.parallel.sequence.fpdt.keys import Keys
from jaxscale.parallel.sequence.fpdt.stream import Saved
from jaxscale.types import Array


class ByQueries(Backward):
    """The backward of one layer while it is traced; arguments as `Backward`."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        # Keys and values of the sequence, and their gradients through the queries so far.
        self.kv: tuple[Array, Array] | None = None
        self.dkv: tuple[Array, Array] | None = None

    def over_chunks(self) -> None:
        """As `Backward`."""
        if self.is_attended_again:
            self._set_keys(self.attend_again())
        last = self.cuts.num - 1
        coming, self.dx = self.coming(last, self.dx)
        for number in range(last, -1, -1):
            coming = self._one_chunk(number, coming)
        self.project_back()

    def _one_chunk(self, number: int, saved: Saved) -> Saved | None:
        """All of the backward of a chunk, while what was kept of the one before it comes.

        Of the chunk after it, the gradients of queries, keys and values are on their way here. They
        come beside this chunk's feed-forward, and are projected back beside the exchange of its
        queries and cotangents.

        Args:
            number: of the chunk.
            saved: of its forward, as it comes.
        Returns:
            What comes; None after the first chunk.
        """
        saved, self.dx = tied((saved, self.dx))
        x, do, delta = self.before_attention(number, saved)
        if self.kv is None:
            self._project_keys(x)
        q, do, delta, pulls = self._enter(number, x, do, delta)
        coming = None
        if number:
            coming, q = self.coming(number - 1, q)
        dq = self._through(number, q, do, (saved.lse, delta))
        complete = [dq]
        for each in self.dkv:
            complete.append(self.cuts.own(each, number))
        cotangents = tuple(each.astype(q.dtype) for each in complete)
        self.send_back(number, cotangents, *pulls)
        return coming

    def _enter(
        self,
        number: int,
        x: Array,
        do: Array,
        delta: Array,
    ) -> tuple[Array, Array, Array, tuple[Callable, Callable]]:
        """(q, do, delta) by heads and q's way back, as `send_back` wants it.

        Beside their exchange the gradients of the chunk after it are projected back.
        """
        (q, *kv), pull_projection = jax.vjp(
            self.project(number),
            self.params,
            x,
        )
        q, self.dx = tied((q, self.dx))
        (q, _, _), pull_exchange = jax.vjp(self.stream.enter, q, *kv)
        do, delta = self.enter_cotangents(q, do, delta)
        self.project_back()
        q, do, delta, self.dx = tied((q, do, delta, self.dx))
        return q, do, delta, (pull_exchange, pull_projection)

    def _through(
        self,
        number: int,
        q: Array,
        do: Array,
        rows: tuple[Array, Array],
    ) -> Array:
        """The gradient of a chunk's queries; those of the keys that they see are added up."""
        seen = self.tokens.intervals.of(number, q.shape[1])
        backward = self.stream.attention.backward
        dq, *parts = backward(q, *self.kv, do, *rows, *seen)
        dkv = tuple(map(jnp.add, self.dkv, parts))
        # Tied, or else XLA keeps what the kernel gives for each chunk and adds it up at the end.
        self.dkv, self.dx = tied((dkv, self.dx))
        return dq

    def _project_keys(self, x_last: Array) -> None:
        """Makes the keys and values of all chunks again; of the last the input is there."""
        keys = Keys(self.stream.attention, self.cuts.num, "device")
        arriving = []
        for i in range(self.cuts.num):
            is_last = i + 1 == self.cuts.num
            x = x_last if is_last else self.input(i)
            x, self.dx = tied((x, self.dx))
            q, *kv = self.project(i)(self.params, x)
            kv, self.dx = tied((kv, self.dx))
            if arriving:
                # Those of the chunk before have come beside this one's projection.
                keys.add(i - 1, arriving)
            keys.kept, self.dx = tied((keys.kept, self.dx))
            _, *arriving = self.stream.enter(q, *kv)
        keys.add(self.cuts.num - 1, arriving)
        self._set_keys(keys)

    def _set_keys(self, keys: Keys) -> None:
        self.kv = tuple(keys.kept)
        self.dkv = tuple(map(zeros, self.kv))
