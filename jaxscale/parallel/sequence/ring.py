"""Ring attention: each member keeps its queries, and the keys and values of every member pass by.

Source: Liu et al. 2023 (arXiv 2310.01889), section 3. The tokens lie in the zigzag of Llama 3
    (arXiv 2407.21783, section 3.3.2), which balances the causal work.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.attention import blockwise as block_attention
from jaxscale.ops.attention.context import NEVER
from jaxscale.parallel.mesh import SEQUENCE
from jaxscale.types import Array

Sums = tuple[Array, Array]  # output and lse over the keys seen so far, half by half
Attend = Callable[[Array, Any, Any], tuple[Any, Any]]  # see `_Transport.go_round`


def ring_attention(
    *,
    ring: int,
    num_ulysses: int = 1,
    uses_permute: bool,
    implementation: str | None = None,
) -> Callable:
    """Attention of each member's queries over the keys of all, for a batch that `Zigzag` laid out.

    Blocks are added up by the online softmax in at least float32. In the backward the gradients of
    keys and values travel to the member whose block it is. Documents, windows and soft-caps are
    read off positions and segments on both sides. Each round looks at half of a block's logits: all
    queries at the first half of the keys of an earlier member, or the second half of the queries at
    all keys of a later one.

    Args:
        ring: R, members.
        num_ulysses: U, neighbours on the `sequence` axis with the same tokens and other heads; the
            members of a ring are U apart.
        uses_permute: whether blocks go round by `ppermute`, for which every device must take part.
            Otherwise they are gathered at once. That is right in a branch that only some pipeline
            stages take, and sends as many bytes, but it holds the keys and values of the whole
            sequence, in the backward their float32 gradients too.
        implementation: of `ops.attention.blockwise`; None picks one and logs it.
    Returns:
        (q, k, v, context, cache) -> (o, cache) on local q [B, T / R, N, H], k and v [B, T / R, K,
        H].
    Raises:
        InputError: (on call) the named backend is unknown or cannot do what is asked.
    Cost: a device sends R - 1 blocks of k and v forward; backward as much again, and their
        gradients in at least float32. The rounds are unrolled: compilation grows with R.
    """
    kind = _Permute if uses_permute else _Gather
    transport = kind(ring, num_ulysses)

    def attention(
        q: Array,
        k: Array,
        v: Array,
        context: AttentionContext,
        cache: Any,
    ) -> tuple[Array, Any]:
        backend = implementation
        if backend is None:
            backend = block_attention.choose(q, context)
        block_attention.check_backend("attention", backend, q, context)
        return _attend(transport, backend, q, k, v, context), cache

    return attention


@dataclasses.dataclass(frozen=True)
class _Transport:
    """How blocks reach the other members of a ring.

    Args:
        ring: R.
        num_ulysses: U.
    """

    ring: int
    num_ulysses: int

    def member(self) -> Array:
        """Number of this member in its ring."""
        return lax.axis_index(SEQUENCE) // self.num_ulysses

    def sources(self) -> list[Array]:
        """The member whose block arrives in each of the R - 1 rounds."""
        rounds = range(1, self.ring)
        return [(self.member() - number) % self.ring for number in rounds]

    def go_round(self, block: Any, attend: Attend, sums: Any) -> tuple[Any, Any]:
        """Attends to the block of every other member.

        Args:
            block: this member's.
            attend: (is_earlier, block, sums) -> (sums, gradient of the block), where `is_earlier`
                says whether the block's member comes before this one in the ring.
            sums: what `attend` is given first.
        Returns:
            (sums, the other members' gradients of this member's block, summed), None for the latter
            in a ring of one.
        """
        raise NotImplementedError


class _Permute(_Transport):
    """Each member passes the block that it has to the next, R - 1 times.

    The sum of a block's gradients travels behind it, one round later, and each member adds its
    part. The block of the last round came from the next member, so one more pass brings the sum
    home.

    Both are on their way while a member attends to the block before. Left to itself XLA would send
    every block before the first round, with nothing beside them, and keep them all.
    """

    def go_round(self, block: Any, attend: Attend, sums: Any) -> tuple[Any, Any]:
        sources, gradient = self.sources(), None
        if sources:
            block = self._pass_on(block)
        for number, source in enumerate(sources, 1):
            # What is sent in this round leaves when the round before has ended.
            block, gradient, sums = lax.optimization_barrier((block, gradient, sums))
            here = block
            if number < len(sources):
                block = self._pass_on(block)
            arriving = self._pass_on(gradient)
            sums, part = attend(source < self.member(), here, sums)
            gradient = part if number == 1 else jax.tree.map(jnp.add, arriving, part)
        return sums, self._pass_on(gradient)

    def _pass_on(self, block: Any) -> Any:
        size = self.ring * self.num_ulysses
        pairs = [(rank, (rank + self.num_ulysses) % size) for rank in range(size)]
        return jax.tree.map(lambda x: lax.ppermute(x, SEQUENCE, pairs), block)


class _Gather(_Transport):
    """Every member gathers all blocks at once."""

    def go_round(self, block: Any, attend: Attend, sums: Any) -> tuple[Any, Any]:
        def gather(x: Array) -> Array:
            return lax.all_gather(x, SEQUENCE, axis_index_groups=self._groups())

        blocks = jax.tree.map(gather, block)
        gradients = []
        for source in self.sources():
            of_source = jax.tree.map(lambda x, source=source: x[source], blocks)
            sums, part = attend(source < self.member(), of_source, sums)
            gradients.append(part)
        return sums, self._sum_at_source(gradients) if gradients else None

    def _sum_at_source(self, gradients: list[Any]) -> Any:
        """The sum of all members' gradients of this member's block, given those of `sources`."""

        def summed(*parts: Array) -> Array:
            by_member = jnp.zeros((self.ring, *parts[0].shape), parts[0].dtype)
            for source, part in zip(self.sources(), parts, strict=True):
                by_member = lax.dynamic_update_index_in_dim(by_member, part, source, axis=0)
            return lax.psum_scatter(by_member, SEQUENCE, axis_index_groups=self._groups())

        return jax.tree.map(summed, *gradients)

    def _groups(self) -> list[list[int]] | None:
        """The places on the axis of each ring's members; None where one ring takes all of it."""
        if self.num_ulysses == 1:
            return None
        step = self.num_ulysses
        size = self.ring * step
        return [list(range(first, size, step)) for first in range(step)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    transport: _Transport,
    backend: str,
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
) -> Array:
    return _forward(transport, backend, q, k, v, context)[0]


class _Saved(NamedTuple):
    """What the backward needs of the forward."""

    q: Array
    k: Array
    v: Array
    context: AttentionContext
    o: Array
    lse: Array


def _forward(
    transport: _Transport,
    backend: str,
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
) -> tuple[Array, _Saved]:
    queries = _halves((q, _query_tokens(context)))

    def attend(is_earlier: Array, block: Any, sums: Sums) -> tuple[Sums, tuple]:
        for query_half, key_half in _visible(is_earlier):
            q, tokens = _index(queries, query_half)
            (k, v), key_tokens = _index(block, key_half)
            visible = _context_over(context, tokens, k, key_tokens)
            o, lse = block_attention.forward(q, k, v, visible, backend)
            part = _only_in(query_half, o, 0), _only_in(query_half, lse, NEVER)
            sums = _merge(sums, part)
        return sums, ()

    sums = _halves(block_attention.forward(q, k, v, context, backend))
    sums, _ = transport.go_round(_block(k, v, context), attend, sums)
    o, lse = _whole(sums)
    o = o.astype(q.dtype)
    return o, _Saved(q, k, v, context, o, lse)


def _backward(
    transport: _Transport,
    backend: str,
    saved: _Saved,
    do: Array,
) -> tuple:
    q, k, v, context, o, lse = saved
    # Blocks go round again: XLA would otherwise keep the first that came in the forward.
    k, v, do = lax.optimization_barrier((k, v, do))
    queries = _halves((q, o, lse, do, _query_tokens(context)))

    def attend(is_earlier: Array, block: Any, dq: Array) -> tuple[Array, Array]:
        dkv = 0
        for query_half, key_half in _visible(is_earlier):
            q, o, lse, do, tokens = _index(queries, query_half)
            (k, v), key_tokens = _index(block, key_half)
            visible = _context_over(context, tokens, k, key_tokens)
            dq_part, *dkv_part = block_attention.backward(q, k, v, visible, o, lse, do, backend)
            dq = dq + _only_in(query_half, dq_part, 0)
            dkv = dkv + _only_in(key_half, jnp.stack(dkv_part), 0)
        return dq, dkv

    dq, *dkv = block_attention.backward(q, k, v, context, o, lse, do, backend)
    dq, of_others = transport.go_round(_block(k, v, context), attend, _halves(dq))
    if of_others is not None:
        of_others = jnp.moveaxis(of_others, 1, 0)
        dkv = [mine + _whole(others) for mine, others in zip(dkv, of_others, strict=True)]
    dk, dv = dkv
    return _whole(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _visible(is_earlier: Array) -> tuple[tuple, tuple]:
    """What this member's queries see of another's keys: (half of the queries, half of the keys).

    The halves are the member's two chunks. Of an earlier member's chunks, every query comes after
    the first and before the second. Of a later member's, only the queries of the second chunk come
    after, and they come after both. So the second half always sees the first, and the other half
    that is seen is the first by the first, or the second by the second.
    """
    half = jnp.where(is_earlier, 0, 1)
    return (1, 0), (half, half)


def _merge(one: Sums, other: Sums) -> Sums:
    """(o, lse) over the keys of both, given those over disjoint keys."""
    (o_one, lse_one), (o_other, lse_other) = one, other
    lse = jnp.logaddexp(lse_one, lse_other)
    weight_one = jnp.exp(lse_one - lse)[..., None]
    weight_other = jnp.exp(lse_other - lse)[..., None]
    return weight_one * o_one + weight_other * o_other, lse


def _block(k: Array, v: Array, context: AttentionContext) -> tuple[Array, Any]:
    """What travels: keys and values [2, 2, B, T / 2, K, H], half by half, and their tokens.

    Keys and values are one array, because XLA keeps one exchange on its way at a time.
    """
    kv = jnp.stack(_halves((k, v)), axis=1)
    return kv, _halves(_key_tokens(context))


def _query_tokens(context: AttentionContext) -> tuple[Array, Array | None]:
    return context.positions, context.segments


def _key_tokens(context: AttentionContext) -> tuple[Array, Array | None] | None:
    """What another member must know of this one's tokens: their (positions, segments).

    None where the mask is causal alone: then the layout says which keys are visible.
    """
    if context.segments is None and context.window is None:
        return None
    return context.positions, context.segments


def _context_over(
    context: AttentionContext,
    query_tokens: tuple,
    k: Array,
    key_tokens: tuple | None,
) -> AttentionContext:
    """The context of some queries over another member's keys, given the tokens of both."""
    positions, segments = query_tokens
    if key_tokens is None:
        # All of these keys come before all of these queries. Equal positions make them visible.
        key_positions = jnp.zeros(k.shape[:2], positions.dtype)
        return dataclasses.replace(
            context,
            positions=jnp.zeros_like(positions),
            key_positions=key_positions,
        )
    key_positions, key_segments = key_tokens
    return dataclasses.replace(
        context,
        positions=positions,
        segments=segments,
        key_positions=key_positions,
        key_segments=key_segments,
    )


def _halves(tree: Any) -> Any:
    """[B, T, ...] to the two halves of the tokens, [2, B, T / 2, ...]."""

    def one(x: Array) -> Array:
        num_rows, length, *rest = x.shape
        return jnp.moveaxis(x.reshape(num_rows, 2, length // 2, *rest), 1, 0)

    return jax.tree.map(one, tree)


def _whole(tree: Any) -> Any:
    """`_halves` undone."""

    def one(x: Array) -> Array:
        _, num_rows, _, *rest = x.shape
        return jnp.moveaxis(x, 0, 1).reshape(num_rows, -1, *rest)

    return jax.tree.map(one, tree)


def _index(tree: Any, half: Array | int) -> Any:
    """One half of every array."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, half, keepdims=False), tree)


def _only_in(half: Array | int, x: Array, elsewhere: float) -> Array:
    """Both halves, of which one is `x` and the other a constant."""
    number = lax.broadcasted_iota(jnp.int32, (2, *[1] * x.ndim), 0)
    return jnp.where(number == half, x, elsewhere)
