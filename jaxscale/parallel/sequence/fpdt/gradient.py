"""The backward of a layer: an outer loop over chunks of keys, an inner one over chunks of queries.

By causality the gradients of chunk i's queries, keys and values are complete when every chunk of
queries from i on has seen the keys of chunk i. So they are projected back at once, and the weights'
gradients are added up chunk by chunk.

Source: Yao et al. 2024 (arXiv 2408.16978), section 5.3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.attention.intervals import row_sums
from jaxscale.ops.precision import accumulator
from jaxscale.parallel.sequence.fpdt.cuts import Cuts, fetch, put, tied
from jaxscale.parallel.sequence.fpdt.keys import Keys
from jaxscale.parallel.sequence.fpdt.stream import Residuals, Saved, Stream, Tokens
from jaxscale.types import Array, Params


def stream_layer(
    stream: Stream,
    params: Params,
    x: Array,
    tokens: Tokens,
) -> tuple[Array, Any]:
    """The layer of `Stream.forward`, differentiable in `params` and `x`.

    Args:
        stream: the layer.
        params, x, tokens: as for `Stream.forward`.
    Returns:
        (residual [B, own T, D], what the router chose, [B, T, ...], or None).
    Cost: of what the forward computes, the backward makes projections and feed-forwards again.
    """

    @jax.custom_vjp
    def run(*arguments: Any) -> tuple[Array, Any]:
        return stream.forward(*arguments)[0]

    def backward(residuals: Residuals, cotangents: tuple[Array, Any]) -> tuple:
        return _Backward(stream, residuals, cotangents).run()

    run.defvjp(stream.forward, backward)
    return run(params, x, tokens)


class _Queries(NamedTuple):
    """What a chunk of queries needs to meet the next chunk of keys.

    Args:
        q, do: [B, C, N', H].
        dq: as far as it is added up, in at least float32.
    """

    q: Array
    do: Array
    dq: Array

    def packed(self) -> Array:
        """All three as one array, [B, C, N', ...], bit by bit.

        XLA keeps two copies between device and host in flight, one each way beside a kernel.
        """
        dq = lax.bitcast_convert_type(self.dq, self.q.dtype)
        return jnp.concatenate([self.q, self.do, dq.reshape(*self.q.shape[:3], -1)], axis=-1)

    @classmethod
    def unpacked(cls, x: Array, head_dim: int) -> "_Queries":
        """The three of which `packed` made `x`."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        q, do, dq = jnp.split(x, [head_dim, 2 * head_dim], axis=-1)
        if wide != x.dtype:
            dq = dq.reshape(*q.shape, -1)
        return cls(q, do, lax.bitcast_convert_type(dq, wide))


class _Coming(NamedTuple):
    """What a pair of chunks needs, on its way to the device.

    Args:
        x: input of the chunk of keys, if the pair is its first.
        queries: `Saved` in the first outer step, later `_Queries` or their packed array.
    """

    x: Array | None
    queries: Any


class _Keys(NamedTuple):
    """The chunk of keys at work.

    Args:
        k, v: [B, C, K', H].
        pull: cotangents of (q, k, v) -> those of (params, x).
        dkv: as far as they are added up, in at least float32.
        dq: of the same chunk's queries, complete.
    """

    k: Array
    v: Array
    pull: Callable
    dkv: tuple[Array, Array]
    dq: Array | None = None


_Pair = tuple[int, int]  # numbers of a chunk of keys and of one of queries


class _Backward:
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
        self.dparams = jax.tree.map(_zeros, self.params)
        # By chunk of queries: what waits, `_Queries` or their packed array, and (lse, delta).
        self.waiting: dict[int, Any] = {}
        self.rows: dict[int, tuple[Array, Array]] = {}
        # Those that were put to rest last.
        self.leaving: list[int] = []
        self.keys: _Keys | None = None

    def run(self) -> tuple:
        """Cotangents of (params, x, tokens)."""
        if self.places.attention == "nowhere":
            self._attend_again()
        num = self.cuts.num
        pairs = [(i, j) for i in range(num) for j in range(i, num)]
        coming, self.dx = self._coming((0, 0), self.dx)
        for pair, following in zip(pairs, [*pairs[1:], None], strict=True):
            coming = self._one_pair(pair, following, coming)

        def rounded(sum: Array, p: Array) -> Array:
            return sum.astype(p.dtype)

        dparams = jax.tree.map(rounded, self.dparams, self.params)
        return dparams, self.dx, None

    def _one_pair(
        self,
        pair: _Pair,
        following: _Pair | None,
        coming: _Coming,
    ) -> _Coming | None:
        """A chunk of queries meets a chunk of keys, while what the following pair needs comes."""
        i, j = pair
        if j == i:
            coming, self.dx = tied((coming, self._settled(self.dx)))
            self._begin(i, coming.x)
        else:
            coming, dkv = tied((coming, self._settled(self.keys.dkv)))
            self.keys = self.keys._replace(dkv=dkv)
        arriving = None
        if following is not None:
            arriving, dkv = self._coming(following, self.keys.dkv)
            self.keys = self.keys._replace(dkv=dkv)
        queries = self._enter(j, coming.queries) if i == 0 else self._back(coming.queries)
        queries = queries._replace(dq=queries.dq + self._through(queries, i, j))
        if j == i:
            self.keys = self.keys._replace(dq=queries.dq)
        elif following == (j, j):
            # They are asked for at once, and so they stay.
            arriving = arriving._replace(queries=queries)
        else:
            self._wait(j, queries)
        if j + 1 == self.cuts.num:
            self._end(i)
        return arriving

    def _begin(self, i: int, x: Array) -> None:
        """Projects the keys and values of chunk i."""
        known = self.cuts.known(self.tokens.known, i)

        def project(params: Params, x: Array) -> tuple[Array, ...]:
            return self.stream.project(params, x, known)

        (_, k, v), pull = jax.vjp(project, self.params, x)
        k, v, dkv = tied((k, v, (_zeros(k), _zeros(v))))
        self.keys = _Keys(k, v, pull, dkv)

    def _through(
        self,
        queries: _Queries,
        i: int,
        j: int,
    ) -> Array:
        """The part of the queries' gradient that chunk i of the keys gives; theirs is added up."""
        lse, delta = self.rows[j]
        k, v = self.keys.k, self.keys.v
        seen = self.tokens.intervals.over(j, i, k.shape[1])
        backward = self.stream.attention.backward
        dq, *parts = backward(queries.q, k, v, queries.do, lse, delta, *seen)
        dkv = jax.tree.map(jnp.add, self.keys.dkv, tuple(parts))
        self.keys = self.keys._replace(dkv=dkv)
        return dq

    def _end(self, i: int) -> None:
        """The way back to the input of chunk i, all of whose gradients are complete."""
        keys = self.keys
        cotangents = keys.dq, *keys.dkv
        dparams, dx = keys.pull(tuple(each.astype(keys.k.dtype) for each in cotangents))
        self._add(dparams)
        dx = self.cuts.own(self.dx, i) + dx
        self._write(self.cuts, dx, i)

    def _wait(self, j: int, queries: _Queries) -> None:
        """Puts a chunk of queries to rest."""
        if self.places.chunks == "device":
            self.waiting[j] = queries
            return
        self.waiting[j] = put(self.places.chunks, queries.packed())
        self.leaving.append(j)

    def _back(self, queries: Any) -> _Queries:
        """A chunk of queries that has been at rest, or has stayed."""
        if isinstance(queries, _Queries):
            return queries
        return _Queries.unpacked(queries, self.keys.k.shape[-1])

    def _settled(self, after: Any) -> Any:
        """`after`, once all but the last chunk of queries that was put to rest has arrived there.

        Nothing else asks for it before the next chunk of keys does, and until it has arrived it
        takes memory on the device too.
        """
        while len(self.leaving) > 1:
            j = self.leaving.pop(0)
            self.waiting[j], after = tied((self.waiting[j], after))
        return after

    def _coming(self, pair: _Pair, after: Any) -> tuple[_Coming, Any]:
        """Begins to fetch what a pair needs, but for queries that are at work in the pair before.

        Returns:
            (_Coming, after), as `fetch`.
        """
        i, j = pair
        if i == 0:
            queries, after = self._coming_saved(j, after)
            return _Coming(queries.x, queries), after
        x = queries = None
        if j == i:
            x, after = fetch(self.places.inputs[i], self.saved[i].x, after)
        if pair != (self.cuts.num - 1, self.cuts.num - 1):
            queries, after = fetch(self.places.chunks, self.waiting[j], after)
        return _Coming(x, queries), after

    def _coming_saved(self, j: int, after: Any) -> tuple[Saved, Any]:
        saved = self.saved[j]
        x, after = fetch(self.places.inputs[j], saved.x, after)
        is_again = self.places.attention == "nowhere"
        place = self.places.chunks if is_again else self.places.attention
        (o, lse), after = fetch(place, (saved.o, saved.lse), after)
        return Saved(x, o, lse), after

    def _enter(self, j: int, saved: Saved) -> _Queries:
        """The backward of what comes after attention, and the queries of chunk j."""
        stream = self.stream
        known = self.cuts.known(self.tokens.known, j)
        o_own, pull = jax.vjp(stream.leave, saved.o)
        parts = []
        for piece, number in stream.pieces_of(j):
            x = stream.pieces.own(saved.x, piece)
            o = stream.pieces.known(o_own, piece)
            parts.append(self._finish(x, o, number))
        (do,) = pull(stream.pieces.join(parts))
        x, do, self.dx, self.dparams = tied((saved.x, do, self.dx, self.dparams))
        q, _, _ = stream.project(self.params, x, known)
        self.rows[j] = saved.lse, row_sums(saved.o, do)
        return _Queries(q, do, _zeros(q))

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

    def _attend_again(self) -> None:
        """Attention's outputs of all chunks, which the forward has not kept."""
        stream, place = self.stream, self.places.chunks
        keys = Keys(stream.attention, self.cuts.num, place)
        for i, saved in enumerate(self.saved):
            x, self.dx = fetch(self.places.inputs[i], saved.x, self.dx)
            known = self.cuts.known(self.tokens.known, i)
            q, *kv = stream.project(self.params, x, known)
            part = keys.attend(i, q, kv, self.tokens.intervals)
            part, self.dx = tied((part, self.dx))
            o = part.o.astype(q.dtype)
            o, lse = put(place, (o, part.lse))
            self.saved[i] = Saved(saved.x, o, lse)

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


def _zeros(x: Array) -> Array:
    """In at least float32, to add up in."""
    return jnp.zeros_like(accumulator(x))
