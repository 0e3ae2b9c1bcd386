"""Ring attention: each member keeps its queries, and the keys and values of every member pass by.

Source: Liu et al. 2023 (arXiv 2310.01889), section 3. The tokens lie in the zigzag of Llama 3
    (arXiv 2407.21783, section 3.3.2), which balances the causal work.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.attention import blockwise as block_attention
from jaxscale.parallel.mesh import SEQUENCE
from jaxscale.types import Array

Sums = tuple[Array, Array]  # output and lse over the keys seen so far


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

    def rounds(self, block: Any) -> Iterator[tuple[Array, Any]]:
        """Yields (source, its block) for every other member, given this member's block."""
        raise NotImplementedError

    def sum_at_source(self, gradients: list[Any]) -> Any:
        """Sends the gradients of blocks back and sums them.

        Args:
            gradients: this member's, of the block of each of `sources`.
        Returns:
            The sum of the other members' gradients of this member's block.
        """
        raise NotImplementedError


class _Permute(_Transport):
    """Each member passes the block that it has to the next, R - 1 times."""

    def rounds(self, block: Any) -> Iterator[tuple[Array, Any]]:
        for source in self.sources():
            block = self._pass_on(block)
            yield source, block

    def sum_at_source(self, gradients: list[Any]) -> Any:
        # A sum travels on from member to member as its block did, and each adds its part. The
        # block of the last round came from the next member, so one more pass brings the sum there.
        total = self._pass_on(gradients[0])
        for part in gradients[1:]:
            total = jax.tree.map(jnp.add, total, part)
            total = self._pass_on(total)
        return total

    def _pass_on(self, block: Any) -> Any:
        size = self.ring * self.num_ulysses
        pairs = [(rank, (rank + self.num_ulysses) % size) for rank in range(size)]
        return jax.tree.map(lambda x: lax.ppermute(x, SEQUENCE, pairs), block)


class _Gather(_Transport):
    """Every member gathers all blocks at once."""

    def rounds(self, block: Any) -> Iterator[tuple[Array, Any]]:
        def gather(x: Array) -> Array:
            return lax.all_gather(x, SEQUENCE, axis_index_groups=self._groups())

        blocks = jax.tree.map(gather, block)
        for source in self.sources():
            yield source, _index(blocks, source)

    def sum_at_source(self, gradients: list[Any]) -> Any:
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
    def add(queries: slice, keys: slice, sums: Sums, block: Any) -> Sums:
        """`sums` with what some of the queries see of some of the block's keys."""
        k, v, key_tokens = _take(block, keys)
        visible = _context_over(context, queries, k, key_tokens)
        part = block_attention.forward(q[:, queries], k, v, visible, backend)
        o, lse = _merge(_take(sums, queries), part)
        o_sums, lse_sums = sums
        return _put(o_sums, o, queries), _put(lse_sums, lse, queries)

    length = q.shape[1]
    sums = block_attention.forward(q, k, v, context, backend)
    for source, block in transport.rounds((k, v, _key_tokens(context))):
        is_earlier = source < transport.member()
        sums = _add_visible(is_earlier, length, add, sums, block)
    o, lse = sums
    o = o.astype(q.dtype)
    return o, _Saved(q, k, v, context, o, lse)


def _backward(
    transport: _Transport,
    backend: str,
    saved: _Saved,
    do: Array,
) -> tuple:
    q, k, v, context, o, lse = saved

    def add(
        queries: slice,
        keys: slice,
        dq: Array,
        block: Any,
    ) -> tuple[Array, list[Array]]:
        """`dq` with what comes through some of the block's keys, and the gradients of the block."""
        k, v, key_tokens = _take(block, keys)
        visible = _context_over(context, queries, k, key_tokens)
        o_part, lse_part, do_part = _take((o, lse, do), queries)
        dq_part, *dkv_part = block_attention.backward(
            q[:, queries],
            k,
            v,
            visible,
            o_part,
            lse_part,
            do_part,
            backend,
        )
        zeros = [jnp.zeros(block[0].shape, part.dtype) for part in dkv_part]
        dkv = [_put(*each, keys) for each in zip(zeros, dkv_part, strict=True)]
        dq_part = dq[:, queries] + dq_part
        return _put(dq, dq_part, queries), dkv

    length = q.shape[1]
    dq, *dkv = block_attention.backward(q, k, v, context, o, lse, do, backend)
    gradients = []
    for source, block in transport.rounds((k, v, _key_tokens(context))):
        is_earlier = source < transport.member()
        dq, of_block = _add_visible(is_earlier, length, add, dq, block)
        gradients.append(of_block)
    if gradients:
        of_others = transport.sum_at_source(gradients)
        dkv = jax.tree.map(jnp.add, dkv, of_others)
    dk, dv = dkv
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _add_visible(
    is_earlier: Array,
    length: int,
    add: Callable,
    sums: Any,
    block: Any,
) -> Any:
    """Adds what this member's queries see of the source's block.

    Of an earlier member's two chunks, every query comes after the first and before the second. Of a
    later member's, only the queries of the second chunk come after, and they come after both.

    Args:
        is_earlier: whether the source's number in the ring is below this member's.
        length: T / R, tokens of a member.
        add: (part of the queries, part of the block's keys, sums, block) -> sums.
        sums, block: as `add` takes them.
    """
    middle = length // 2
    first, second = slice(0, middle), slice(middle, length)
    both = slice(0, length)
    add_earlier = functools.partial(add, both, first)
    add_later = functools.partial(add, second, both)
    return lax.cond(is_earlier, add_earlier, add_later, sums, block)


def _merge(one: Sums, other: Sums) -> Sums:
    """(o, lse) over the keys of both, given those over disjoint keys."""
    (o_one, lse_one), (o_other, lse_other) = one, other
    lse = jnp.logaddexp(lse_one, lse_other)
    weight_one = jnp.exp(lse_one - lse)[..., None]
    weight_other = jnp.exp(lse_other - lse)[..., None]
    return weight_one * o_one + weight_other * o_other, lse


def _key_tokens(context: AttentionContext) -> tuple[Array, Array | None] | None:
    """What another member must know of this one's tokens: their (positions, segments).

    None where the mask is causal alone: then the layout says which keys are visible.
    """
    if context.segments is None and context.window is None:
        return None
    return context.positions, context.segments


def _context_over(
    context: AttentionContext,
    queries: slice,
    k: Array,
    key_tokens: tuple | None,
) -> AttentionContext:
    """The context of some of the queries over another member's keys, given `_key_tokens` of it."""
    positions = context.positions[:, queries]
    if key_tokens is None:
        # All of these keys come before all of these queries. Equal positions make them visible.
        key_positions = jnp.zeros(k.shape[:2], positions.dtype)
        return dataclasses.replace(
            context,
            positions=jnp.zeros_like(positions),
            key_positions=key_positions,
        )
    segments = None if context.segments is None else context.segments[:, queries]
    key_positions, key_segments = key_tokens
    return dataclasses.replace(
        context,
        positions=positions,
        segments=segments,
        key_positions=key_positions,
        key_segments=key_segments,
    )


def _index(tree: Any, index: Array) -> Any:
    """One block of every array, axis 0."""
    return jax.tree.map(lambda x: x[index], tree)


def _take(tree: Any, part: slice) -> Any:
    """A part of the tokens, axis 1, of every array."""
    return jax.tree.map(lambda x: x[:, part], tree)


def _put(x: Array, values: Array, part: slice) -> Array:
    """`x` with `values` as that part of its tokens."""
    # Not x.at[:, part].set(values): that scatters, and XLA's CPU compiler crashes on a scatter in
    # these branches.
    return lax.dynamic_update_slice_in_dim(x, values, part.start, axis=1)
