"""The backward of a layer whose chunks rest on the host.

An outer loop goes over chunks of keys, an inner one over chunks of queries. By causality the
gradients of chunk i's queries, keys and values are complete when every chunk of queries from i on
has seen the keys of chunk i. So they are projected back at once or, where heads are exchanged, with
the next chunk's keys, and the weights' gradients are added up chunk by chunk.

Source: Yao et al. 2024 (arXiv 2408.16978), section 5.3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.parallel.sequence.fpdt.backward import Backward, zeros
from jaxscale.parallel.sequence.fpdt.cuts import fetch, put, tied
from jaxscale.parallel.sequence.fpdt.stream import Saved
from jaxscale.types import Array


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

        XLA keeps two copies between device and host in flight, one each way beside a kernel. On a
        CPU jax 0.10 makes the signalling NaNs among halves of `dq` quiet, 2^-17 of a value. Joined
        as integers they are kept, but take 1.7 GiB more of a GPU at 131,072 tokens of 8B.
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
        pulls: back through the exchange and back through the projection, as `send_back` has them.
        dkv: as far as they are added up, in at least float32.
        dq: of the same chunk's queries, complete.
    """

    k: Array
    v: Array
    pulls: tuple[Callable, Callable]
    dkv: tuple[Array, Array]
    dq: Array | None = None


_Pair = tuple[int, int]  # numbers of a chunk of keys and of one of queries


class ByKeys(Backward):
    """The backward of one layer while it is traced; arguments as `Backward`."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        # By chunk of queries: what waits, `_Queries` packed, and (lse, delta).
        self.waiting: dict[int, Array] = {}
        self.rows: dict[int, tuple[Array, Array]] = {}
        # Those that were put to rest last.
        self.leaving: list[int] = []
        self.keys: _Keys | None = None

    def over_chunks(self) -> None:
        """As `Backward`."""
        if self.is_attended_again:
            self.attend_again()
        num = self.cuts.num
        pairs = [(i, j) for i in range(num) for j in range(i, num)]
        coming, self.dx = self._coming((0, 0), self.dx)
        for pair, following in zip(pairs, [*pairs[1:], None], strict=True):
            coming = self._one_pair(pair, following, coming)
        self.project_back()

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
        """Projects the keys and values of chunk i, and back what is on its way."""
        (q, k, v), pull_projection = jax.vjp(
            self.project(i),
            self.params,
            x,
        )
        k, v, self.dx = tied((k, v, self.dx))
        (_, k, v), pull_exchange = jax.vjp(
            self.stream.enter,
            q,
            k,
            v,
        )
        self.project_back()
        dkv = zeros(k), zeros(v)
        k, v, dkv, self.dx = tied((k, v, dkv, self.dx))
        pulls = pull_exchange, pull_projection
        self.keys = _Keys(k, v, pulls, dkv)

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
        """Begins the way back to the input of chunk i, all of whose gradients are complete."""
        keys = self.keys
        complete = keys.dq, *keys.dkv
        cotangents = tuple(each.astype(keys.k.dtype) for each in complete)
        self.send_back(i, cotangents, *keys.pulls)

    def _wait(self, j: int, queries: _Queries) -> None:
        """Puts a chunk of queries to rest."""
        self.waiting[j] = put("host", queries.packed())
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
            queries, after = self.coming(j, after)
            return _Coming(queries.x, queries), after
        x = queries = None
        if j == i:
            x = self.input(i)
        if pair != (self.cuts.num - 1, self.cuts.num - 1):
            queries, after = fetch("host", self.waiting[j], after)
        return _Coming(x, queries), after

    def _enter(self, j: int, saved: Saved) -> _Queries:
        """The backward of what comes after attention, and the queries of chunk j."""
        x, do, delta = self.before_attention(j, saved)
        q, _, _ = self.stream.enter(*self.project(j)(self.params, x))
        do, delta = self.enter_cotangents(q, do, delta)
        self.rows[j] = saved.lse, delta
        return _Queries(q, do, zeros(q))
