"""A layer as functions of one chunk, and its forward from chunk to chunk.

Source: Yao et al. 2024 (arXiv 2408.16978), sections 5.1 to 5.3.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.ad_checkpoint import checkpoint_name

from jaxscale.ops.attention.intervals import IntervalAttention
from jaxscale.parallel.sequence.fpdt.cuts import Cuts, put, tied
from jaxscale.parallel.sequence.fpdt.keys import Intervals, Keys
from jaxscale.types import Array, Params

STREAM = "stream"  # the name of what a layer's forward keeps for its backward


@dataclasses.dataclass(frozen=True)
class Places:
    """Where what a layer keeps rests: "device" or "host".

    Args:
        inputs: of each chunk, the layer's input, from its forward to its backward.
        attention: attention's output with its lse, likewise; "nowhere" makes them again.
        chunks: of the layer at work, what one chunk needs of the others: keys and values in the
            forward; in the backward, on the host, queries, their gradients and the output's
            cotangents, on the device keys and values and their gradients.
    """

    inputs: tuple[str, ...]
    attention: str
    chunks: str


class Tokens(NamedTuple):
    """What is known of the tokens besides their residual; nothing of it is differentiated.

    Args:
        known: tree of [B, T, ...], as the tensor group knows its tokens.
        intervals: the keys that each sees.
    """

    known: Any
    intervals: Intervals


class Saved(NamedTuple):
    """What the backward needs of one chunk's forward; o and lse are None if they are made again.

    Args:
        x: [B, own c, D].
        o: [B, c, N, H] of this device's tokens, so that the backward need not exchange it.
        lse: [B, N', C].
    """

    x: Array
    o: Array | None = None
    lse: Array | None = None


class Residuals(NamedTuple):
    """What the backward needs of the forward.

    Args:
        params: the layer's.
        chunks: of each.
        logits: the router's, [B, T, E]; None without one.
        tokens: as they were given.
    """

    params: Params
    chunks: list[Saved]
    logits: Array | None
    tokens: Tokens


@dataclasses.dataclass(frozen=True)
class Stream:
    """A layer as functions of one chunk.

    Args:
        project: (params, x [B, own c, D], known) -> (q, k, v) of this device's tokens and of all
            heads, as `enter` sends them.
        enter: (q, k, v) -> q [B, C, N', H], k and v [B, C, K', H], of all tokens and of this
            device's heads; linear.
        leave: o [B, C, N', H] -> o [B, c, N, H]; linear.
        finish: (params, x [B, own c, D], o [B, c, N, H], known, router's logits or None) ->
            (y [B, own c, D], what the router chose or None), of a piece of a chunk. The logits are
            those of the forward, given to the backward, which must not make them again.
        attention: of the chunks.
        chunks: how tokens are cut into chunks.
        pieces: how a chunk is cut into what `finish` is given.
        places: where what is kept rests.
        is_exchanged: whether `enter` and `leave` wait for other devices. Then they run beside the
            matmuls of a neighbouring chunk, and some arrays of both are on the device at once.
    """

    project: Callable
    enter: Callable
    leave: Callable
    finish: Callable
    attention: IntervalAttention
    chunks: Cuts
    pieces: Cuts
    places: Places
    is_exchanged: bool = False

    @property
    def all_pieces(self) -> Cuts:
        """How tokens are cut into pieces."""
        return dataclasses.replace(self.chunks, num=self.chunks.num * self.pieces.num)

    def pieces_of(self, chunk: int) -> list[tuple[int, int]]:
        """(number in the chunk, number in the sequence) of each piece of a chunk."""
        return [(i, chunk * self.pieces.num + i) for i in range(self.pieces.num)]

    def forward(
        self,
        params: Params,
        x: Array,
        tokens: Tokens,
    ) -> tuple[tuple[Array, Any], Residuals]:
        """The whole layer.

        Args:
            params: the layer's.
            x: residual [B, own T, D].
            tokens: what else is known of them.
        Returns:
            ((residual [B, own T, D], what the router chose, [B, T, ...], or None), Residuals).
        """
        keys = Keys(self.attention, self.chunks.num, self.places.chunks)
        saved, choices = [], []
        ahead = None  # of the next chunk, on its way
        for i in range(self.chunks.num):
            if ahead is None:
                ahead, x = self._enter(params, x, tokens, i)
            # Tied here and below. Else the compiler makes all chunks' widest arrays at once, and
            # reads a chunk where it lies in `x`, so that the result cannot take its place.
            (x_i, q, kv), x = tied((ahead, x))
            ahead = None
            # What is kept leaves beside attention.
            kept = put(self.places.inputs[i], x_i)
            part = keys.attend(i, q, kv, tokens.intervals)
            o, x = tied((part.o.astype(q.dtype), x))
            o_own = self.leave(o)
            saved.append(Saved(_named(kept), *self._keep(o_own, part.lse)))
            if self.is_exchanged and i + 1 < self.chunks.num:
                # The projection runs beside the exchange of `o`, and the feed-forward below beside
                # that of the heads which it makes.
                ahead, x = self._enter(params, x, tokens, i + 1)
            x, ahead, chosen = self._after_attention(params, x, (i, x_i, o_own), ahead, tokens)
            choices += chosen
        choices = None if choices[0] is None else self.all_pieces.join(choices)
        logits = None if choices is None else choices.logits
        return (x, choices), Residuals(params, saved, logits, tokens)

    def _enter(
        self,
        params: Params,
        x: Array,
        tokens: Tokens,
        number: int,
    ) -> tuple[tuple[Array, Array, list[Array]], Array]:
        """A chunk's (input, q, [k, v]), the last two on their way, and `x` once it is projected."""
        x, x_i = tied((x, self.chunks.own(x, number)))
        q, *kv = self.project(params, x_i, self.chunks.known(tokens.known, number))
        (q, kv), x = tied(((q, kv), x))
        q, *kv = self.enter(q, *kv)
        return (x_i, q, kv), x

    def _after_attention(
        self,
        params: Params,
        x: Array,
        chunk: tuple[int, Array, Array],
        ahead: Any,
        tokens: Tokens,
    ) -> tuple[Array, Any, list[Any]]:
        """Finishes a chunk, (its number, input, attention's output), while `ahead` is on its way.

        Returns:
            (x with the chunk replaced, ahead, what the router chose of each piece).
        """
        i, x_i, o = chunk
        choices = []
        for piece, number in self.pieces_of(i):
            x, x_i, o = tied((x, x_i, o))
            known = self.all_pieces.known(tokens.known, number)
            arrays = self.pieces.own(x_i, piece), self.pieces.known(o, piece)
            y, chosen = self.finish(params, *arrays, known, None)
            # Not with `x`: what writes into it is a copy, beside which XLA puts no exchange.
            y, ahead = tied((y, ahead))
            x = self.all_pieces.write(x, y, number)
            choices.append(chosen)
        return x, ahead, choices

    def _keep(self, o: Array, lse: Array) -> tuple[Array, ...]:
        """Attention's output and its lse at rest, unless they are made again."""
        if self.places.attention == "nowhere":
            return ()
        return tuple(map(_named, put(self.places.attention, (o, lse))))


def _named(x: Array) -> Array:
    return checkpoint_name(x, STREAM)
