"""What the backward of a layer in chunks does in either order of its chunks.

Where chunks rest on the device the order is that of `by_queries`, else that of `by_keys`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxscale.ops.attention.intervals import row_sums
from jaxscale.ops.precision import accumulator
from jaxscale.parallel.sequence.fpdt.cuts import Cuts, fetch, kept, put, tied
from jaxscale.parallel.sequence.fpdt.keys import Keys
from jaxscale.parallel.sequence.fpdt.stream import Residuals, Saved, Stream
from jaxscale.types import Array, Params


class _Returning(NamedTuple):
    """The gradients of a chunk's queries, keys and values, on their way to their tokens' device.

    Args:
        number: of the chunk.
        cotangents: of what the projection returned.
        pull: those -> of (params, x).
    """

    number: int
    cotangents: tuple[Array, ...]
    pull: Callable


class Backward:
    """The backward of one layer while it is traced.

    Args:
        stream: the layer.
        residuals: of its forward.
        cotangents: of its results.
    """

    def __init__(
        self,
        stream: Stream,
        residuals: Residuals,
        cotangents: tuple[Array, Any],
    ):
        dx, of_choices = cotangents
        self.stream = stream
        self.cuts = stream.chunks
        self.places = stream.places
        self.params = residuals.params
        self.saved = list(residuals.chunks)
        self.tokens = residuals.tokens
        self.logits = residuals.logits
        self.dlogits = None if of_choices is None else of_choices.logits
        # The output's cotangent, in which each chunk is replaced by the input's.
        self.dx = dx
        self.dparams = jax.tree.map(zeros, self.params)
        self.returning: _Returning | None = None

    @property
    def is_attended_again(self) -> bool:
        """Whether the forward has not kept attention's outputs."""
        return self.places.attention == "nowhere"

    def run(self) -> tuple:
        """Cotangents of (params, x, tokens)."""
        self.over_chunks()

        def rounded(sum: Array, p: Array) -> Array:
            return sum.astype(p.dtype)

        dparams = jax.tree.map(rounded, self.dparams, self.params)
        return dparams, self.dx, None

    def over_chunks(self) -> None:
        """Adds up `dparams` and replaces all chunks of `dx`."""
        raise NotImplementedError

    def project(self, number: int) -> Any:
        """The projection of a chunk as a function of (params, x)."""
        known = self.cuts.known(self.tokens.known, number)

        def project(params: Params, x: Array) -> tuple[Array, ...]:
            return self.stream.project(params, x, known)

        return project

    def attend_again(self) -> Keys:
        """Makes attention's outputs of all chunks; returns the keys and values."""
        place = self.places.chunks
        keys = Keys(self.stream.attention, self.cuts.num, place)
        ahead = None
        for i in range(self.cuts.num):
            if ahead is None:
                ahead = self._enter_again(i)
            (q, *kv), self.dx = tied((ahead, self.dx))
            ahead = None
            if self.stream.is_exchanged and i + 1 < self.cuts.num:
                # The exchange of the next chunk's heads is beside the attention of this one. On the
                # device this chunk's keys are copied after the exchange has begun and before the
                # attention, which else would have all multiprocessors first.
                ahead = self._enter_again(i + 1)
                (q, kv), self.dx = tied(((q, kv), self.dx))
            part = keys.attend(i, q, kv, self.tokens.intervals)
            # In the type of q before it is tied: XLA rounds what it keeps only where it is read.
            o, lse, self.dx = tied((part.o.astype(q.dtype), part.lse, self.dx))
            o, lse = put(place, (self.stream.leave(o), lse))
            self.saved[i] = Saved(self.saved[i].x, o, lse)
        return keys

    def _enter_again(self, number: int) -> tuple[Array, ...]:
        """A chunk's q, k and v on their way; what follows on `dx` waits for their projection."""
        x, self.dx = tied((self.input(number), self.dx))
        local, self.dx = tied((self.project(number)(self.params, x), self.dx))
        return self.stream.enter(*local)

    def input(self, number: int) -> Array:
        """A chunk's input, on its way."""
        return kept(self.places.inputs[number], self.saved[number].x)

    def coming(self, number: int, after: Any) -> tuple[Saved, Any]:
        """What is there of a chunk's forward, on its way; (Saved, after), as `fetch`."""
        _, o, lse = self.saved[number]
        if self.is_attended_again:
            (o, lse), after = fetch(self.places.chunks, (o, lse), after)
        else:
            o, lse = kept(self.places.attention, (o, lse))
        return Saved(self.input(number), o, lse), after

    def before_attention(self, number: int, saved: Saved) -> tuple[Array, Array, Array]:
        """The backward of what comes after attention in a chunk.

        Returns:
            (x, do [B, c, N, H], delta [B, N, c]), the cotangent of attention's output and what the
            kernel wants of both, of this device's tokens, after all of it.
        """
        stream = self.stream
        parts = []
        for piece, of_all in stream.pieces_of(number):
            x = stream.pieces.own(saved.x, piece)
            o = stream.pieces.known(saved.o, piece)
            parts.append(self._finish(x, o, of_all))
        do = stream.pieces.join(parts)
        delta = row_sums(saved.o, do)
        x, do, delta, self.dx, self.dparams = tied((saved.x, do, delta, self.dx, self.dparams))
        return x, do, delta

    def enter_cotangents(
        self,
        q: Array,
        do: Array,
        delta: Array,
    ) -> tuple[Array, Array]:
        """What `before_attention` returns, exchanged: do as q [B, C, N', H], delta [B, N', C]."""

        def enter(like: Array, cotangent: Array) -> Array:
            _, pull = jax.vjp(self.stream.leave, like)
            return pull(cotangent)[0]

        by_token = jnp.swapaxes(delta, 1, 2)[..., None]
        delta = enter(q[..., :1].astype(delta.dtype), by_token)
        return enter(q, do), jnp.swapaxes(delta[..., 0], 1, 2)

    def _finish(
        self,
        x: Array,
        o: Array,
        number: int,
    ) -> Array:
        """The cotangent of a piece's attention; that of its residual is written into `dx`."""
        cuts = self.stream.all_pieces
        known = cuts.known(self.tokens.known, number)
        logits = cuts.known(self.logits, number)
        dlogits = cuts.known(self.dlogits, number)

        def finish(
            params: Params,
            x: Array,
            o: Array,
        ) -> tuple[Array, Array | None]:
            y, choices = self.stream.finish(params, x, o, known, logits)
            return y, None if choices is None else choices.logits

        dy = cuts.own(self.dx, number)
        self.dx, dy, x, o = tied((self.dx, dy, x, o))
        _, pull = jax.vjp(finish, self.params, x, o)
        dparams, dx, do = pull((dy, dlogits))
        self._add(dparams)
        self._write(cuts, dx, number)
        return do

    def send_back(
        self,
        number: int,
        cotangents: tuple[Array, ...],
        pull_exchange: Callable,
        pull_projection: Callable,
    ) -> None:
        """Begins the way of a chunk's complete gradients back to its input; `project_back` ends it.

        Args:
            number: of the chunk.
            cotangents: of its queries, keys and values, by heads.
            pull_exchange: those -> of what the projection returned.
            pull_projection: those -> of (params, x).
        """
        cotangents, self.dx = tied((cotangents, self.dx))
        self.returning = _Returning(number, pull_exchange(cotangents), pull_projection)
        if not self.stream.is_exchanged:
            self.project_back()

    def project_back(self) -> None:
        """Projects back what is on its way, if anything is.

        What runs between the two has the exchange beside it.
        """
        if self.returning is None:
            return
        (number, cotangents, pull), self.returning = self.returning, None
        cotangents, self.dx = tied((cotangents, self.dx))
        dparams, dx = pull(cotangents)
        self._add(dparams)
        self._write(self.cuts, self.cuts.own(self.dx, number) + dx, number)

    def _add(self, dparams: Params) -> None:
        def add(sum: Array, part: Array) -> Array:
            return sum + part.astype(sum.dtype)

        self.dparams = jax.tree.map(add, self.dparams, dparams)

    def _write(
        self,
        cuts: Cuts,
        dx: Array,
        number: int,
    ) -> None:
        """Puts a part into `dx`, after which the next step may begin."""
        self.dx = cuts.write(self.dx, dx, number)
        self.dx, self.dparams = tied((self.dx, self.dparams))


def zeros(x: Array) -> Array:
    """In at least float32, to add up in."""
    return jnp.zeros_like(accumulator(x))
