"""Ring attention: each member keeps its queries, and every member's keys come by; the causal work is balanced.

Source: Liu et al. 2023 (arXiv 2310.01889), section 3; the layout is that of Llama 3 (arXiv
    2407.21783, section 3.3.2).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.attention import blockwise as block_attention
from jaxscale.parallel.mesh import SEQUENCE, nearest_multiples
from jaxscale.types import Array, Batch, InputError


def zigzag_order(length: int, ring: int) -> np.ndarray:
    """Which token of the sequence stands where: of 2 * ring chunks, member i holds chunks i and 2 * ring - 1 - i.

    Then every member has as many keys to look at in each round, whatever the round.

    Args:
        length: T.
        ring: members.
    Returns:
        [T] index into the sequence, member by member.
    Raises:
        InputError: the chunks are not equal.
    """
    if rest := length % (2 * ring):
        raise InputError(
            "DataConfig.sequence_length",
            length,
            f"sequence_length % (2 * ring) == 0, here {length} % (2 * {ring}) = {rest}; nearest: "
            + nearest_multiples(length, 2 * ring),
        )
    chunks = np.arange(length).reshape(2 * ring, -1)
    return np.concatenate([chunks[[i, 2 * ring - 1 - i]].reshape(-1) for i in range(ring)])


def to_zigzag(batch: Batch, ring: int) -> Batch:
    """Lays the tokens out for the ring; what is kept for each token, positions and weights too, goes along.

    Args:
        batch: local arrays [b, T / sequence], contiguous shares of [b, T].
        ring: members.
    Returns:
        The same, shares of the sequence in `zigzag_order`.
    Raises:
        InputError: T does not divide into 2 * ring chunks.
    Cost: one all-gather of [b, T] for each array.
    """
    num_shares, rank = lax.axis_size(SEQUENCE), lax.axis_index(SEQUENCE)

    def permuted(x: Array) -> Array:
        whole = lax.all_gather(x, SEQUENCE, axis=1, tiled=True)
        order = zigzag_order(whole.shape[1], ring).reshape(num_shares, -1)
        return jnp.take(whole, jnp.asarray(order)[rank], axis=1)

    return jax.tree.map(permuted, batch)


def ring_attention(
    *, ring: int, num_ulysses: int = 1, uses_permute: bool, implementation: str | None = None
) -> Callable:
    """Attention of each member's queries over the keys of all, for a batch that `to_zigzag` laid out.

    Blocks are added up by the online softmax in at least float32; the backward passes the gradients
    of keys and values round with their block. Documents, windows and soft-caps are read off
    positions and segments on both sides. Each round looks at half of a block's logits: all queries
    at the first half of the keys of an earlier member, or the second half of the queries at all
    keys of a later one.

    Args:
        ring: R, members.
        num_ulysses: U, neighbours on the `sequence` axis with the same tokens and other heads; the
            members of a ring are U apart.
        uses_permute: whether blocks go round by `ppermute`, for which every device must take part.
            Else they are gathered at once, which is right in a branch that only some pipeline
            stages take, sends as many bytes, and holds the keys and values of the whole sequence,
            in the backward their float32 gradients too.
        implementation: of `ops.attention.blockwise`; None picks one and logs it.
    Returns:
        (q, k, v, context, cache) -> (o, cache) on local q [B, T / R, N, H], k and v [B, T / R, K,
        H].
    Raises:
        InputError: (on call) the named backend is unknown or cannot do what is asked.
    Cost: a device sends R - 1 blocks of k and v forward; backward as much again, and their
        gradients in at least float32. The rounds are unrolled: compilation grows with R.
    """
    transport = (_Permute if uses_permute else _Gather)(ring, num_ulysses)

    def attention(
        q: Array, k: Array, v: Array, context: AttentionContext, cache: Any
    ) -> tuple[Array, Any]:
        chosen = block_attention.choose(q, context) if implementation is None else implementation
        block_attention.check_backend("attention", chosen, q, context)
        return _attend(transport, chosen, q, k, v, context), cache

    return attention


@dataclasses.dataclass(frozen=True)
class _Transport:
    """How blocks come by.

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
        """Whose block comes by in each of the R - 1 rounds."""
        return [(self.member() - number) % self.ring for number in range(1, self.ring)]

    def rounds(self, block: Any) -> Iterator[tuple[Array, Any]]:
        """Yields (source, its block) for every other member, given this member's block."""
        raise NotImplementedError

    def home(self, gradients: list[Any]) -> Any:
        """The sum of what all members have for this member's block, given what this one has for those of `sources`."""
        raise NotImplementedError


class _Permute(_Transport):
    def rounds(self, block: Any) -> Iterator[tuple[Array, Any]]:
        for source in self.sources():
            block = self._pass_on(block)
            yield source, block

    def home(self, gradients: list[Any]) -> Any:
        travelling = self._pass_on(gradients[0])
        for each in gradients[1:]:
            travelling = self._pass_on(jax.tree.map(jnp.add, travelling, each))
        return travelling

    def _pass_on(self, block: Any) -> Any:
        size = self.ring * self.num_ulysses
        pairs = [(rank, (rank + self.num_ulysses) % size) for rank in range(size)]
        return jax.tree.map(lambda x: lax.ppermute(x, SEQUENCE, pairs), block)


class _Gather(_Transport):
    def rounds(self, block: Any) -> Iterator[tuple[Array, Any]]:
        whole = jax.tree.map(
            lambda x: lax.all_gather(x, SEQUENCE, axis_index_groups=self._groups()), block
        )
        for source in self.sources():
            yield source, jax.tree.map(lambda x, source=source: x[source], whole)

    def home(self, gradients: list[Any]) -> Any:
        def summed(*parts: Array) -> Array:
            whole = jnp.zeros((self.ring, *parts[0].shape), parts[0].dtype)
            for source, part in zip(self.sources(), parts, strict=True):
                whole = lax.dynamic_update_index_in_dim(whole, part, source, axis=0)
            return lax.psum_scatter(whole, SEQUENCE, axis_index_groups=self._groups())

        return jax.tree.map(summed, *gradients)

    def _groups(self) -> list[list[int]] | None:
        if self.num_ulysses == 1:
            return None
        return [
            [i * self.num_ulysses + u for i in range(self.ring)] for u in range(self.num_ulysses)
        ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    transport: _Transport, backend: str, q: Array, k: Array, v: Array, context: AttentionContext
) -> Array:
    return _forward(transport, backend, q, k, v, context)[0]


def _forward(
    transport: _Transport, backend: str, q: Array, k: Array, v: Array, context: AttentionContext
):
    def add(
        rows: slice, columns: slice, sums: tuple[Array, Array], block: Any
    ) -> tuple[Array, Array]:
        k, v, keys = _cut(block, columns)
        part = block_attention.forward(q[:, rows], k, v, _between(context, rows, k, keys), backend)
        merged = _merge(_cut(sums, rows), part)
        return jax.tree.map(lambda whole, cut: _put(whole, cut, rows), sums, merged)

    sums = block_attention.forward(q, k, v, context, backend)
    for source, block in transport.rounds((k, v, _keys(context))):
        sums = _by_side(transport.member(), source, q.shape[1], add, sums, block)
    o, lse = sums[0].astype(q.dtype), sums[1]
    return o, (q, k, v, context, o, lse)


def _backward(transport: _Transport, backend: str, kept: tuple, do: Array):
    q, k, v, context, o, lse = kept

    def add(rows: slice, columns: slice, dq: Array, block: Any) -> tuple[Array, list[Array]]:
        k, v, keys = _cut(block, columns)
        between = _between(context, rows, k, keys)
        part, *of_block = block_attention.backward(
            q[:, rows], k, v, between, *_cut((o, lse, do), rows), backend
        )
        whole = [_put(jnp.zeros(block[0].shape, cut.dtype), cut, columns) for cut in of_block]
        return _put(dq, dq[:, rows] + part, rows), whole

    dq, *dkv = block_attention.backward(q, k, v, context, o, lse, do, backend)
    gradients = []
    for source, block in transport.rounds((k, v, _keys(context))):
        dq, of_block = _by_side(transport.member(), source, q.shape[1], add, dq, block)
        gradients.append(of_block)
    if gradients:
        dkv = jax.tree.map(jnp.add, dkv, transport.home(gradients))
    return *(d.astype(x.dtype) for d, x in zip((dq, *dkv), (q, k, v), strict=True)), None


_attend.defvjp(_forward, _backward)


def _by_side(
    member: Array, source: Array, length: int, add: Callable, sums: Any, block: Any
) -> Any:
    """add(rows of the queries, columns of the block's keys, sums, block) for what is visible of the source's block.

    Of an earlier member every query comes after the first chunk and before the second; of a later
    one only the queries of the second chunk come after, and after both.
    """
    everything, first, second = slice(0, length), slice(0, length // 2), slice(length // 2, length)
    earlier = functools.partial(add, everything, first)
    later = functools.partial(add, second, everything)
    return lax.cond(source < member, earlier, later, sums, block)


def _merge(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """(o, lse) over the keys of both, given those over disjoint keys."""
    lse = jnp.logaddexp(one[1], other[1])
    weights = [jnp.exp(part - lse)[..., None] for part in (one[1], other[1])]
    return weights[0] * one[0] + weights[1] * other[0], lse


def _keys(context: AttentionContext) -> tuple[Array, Array | None] | None:
    """What must be known of another member's tokens; None where the layout alone says who is visible."""
    if context.segments is None and context.window is None:
        return None
    return context.positions, context.segments


def _between(
    context: AttentionContext, rows: slice, k: Array, keys: tuple | None
) -> AttentionContext:
    """The context of some of the queries over another member's keys, of which `keys` is known."""
    positions = context.positions[:, rows]
    if keys is None:
        everywhere = jnp.zeros(k.shape[:2], positions.dtype)
        return dataclasses.replace(
            context, positions=jnp.zeros_like(positions), key_positions=everywhere
        )
    segments = None if context.segments is None else context.segments[:, rows]
    return dataclasses.replace(
        context, positions=positions, segments=segments, key_positions=keys[0], key_segments=keys[1]
    )


def _cut(tree: Any, part: slice) -> Any:
    """The part of the tokens, axis 1, of every array."""
    return jax.tree.map(lambda x: x[:, part], tree)


def _put(whole: Array, cut: Array, part: slice) -> Array:
    """`whole` with `cut` as the part of its tokens."""
    # Not whole.at[:, part].set(cut): that scatters, and XLA's CPU compiler dies of a scatter in
    # these branches.
    return lax.dynamic_update_slice_in_dim(whole, cut, part.start, axis=1)
