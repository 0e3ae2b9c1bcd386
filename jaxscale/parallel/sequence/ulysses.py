"""Ulysses: each device has a share of the sequence, and inside attention a share of the heads.

Source: Jacobs et al. 2023, DeepSpeed-Ulysses (arXiv 2309.14509), section 3.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.backends import EXCHANGED
from jaxscale.parallel.mesh import SEQUENCE
from jaxscale.types import Array, InputError


def ulysses(
    attention: Callable,
    *,
    num_members: int,
    ring: int = 1,
) -> Callable:
    """Wraps a single-device attention for members that hold consecutive shares of a sequence.

    All-to-alls change queries, keys and values from shares of the sequence to shares of the heads,
    and the output back. The wrapped attention sees all the members' tokens in order, so it needs to
    know nothing of them for windows, documents and soft-caps. Without documents it sees all rows as
    the heads of one row.

    With grouped queries every kv head must lie beside its query heads. With U members and K kv
    heads each kv head is repeated lcm(K, U) / K times. Where that does not divide the heads, keys
    become as many as queries and both are padded with heads that nobody reads. The gradient of a
    repeated head is the sum of its copies', which the transposition of the repetition makes.

    Args:
        attention: (q, k, v, context, cache) -> (o, cache).
        num_members: U, devices that exchange heads, neighbours on the `sequence` axis.
        ring: groups of U on the axis, which `attention` connects.
    Returns:
        The same on local q [B, T / U, N, H], k and v [B, T / U, K, H] and their context. It raises
        InputError for heads that would not keep the layout of blocks that their number gives them.
    Cost: of q and o together 2 N and of k and v 2 lcm(K, U) heads of B T / U tokens leave a device,
        forward, less the U-th part that stays: 4 N for multi-head.
    """
    group = _Group(num_members, ring)

    def exchanged(
        q: Array,
        k: Array,
        v: Array,
        context: AttentionContext,
        cache: Any,
    ) -> tuple[Array, Any]:
        num_heads = q.shape[2]
        _check_block_layout(context, num_heads, num_members)
        spread = spread_heads(q, k, v, num_members)
        q, k, v = map(group.to_heads, spread)
        context = dataclasses.replace(
            context,
            positions=group.gather(context.positions),
            segments=group.gather(context.segments),
        )
        attend = _rows_as_heads if context.segments is None else _rows_first
        o, cache = attend(attention, q, k, v, context, cache)
        o = group.to_sequence(o)
        return o[:, :, :num_heads], cache  # without the padding of `spread_heads`

    return exchanged


@dataclasses.dataclass(frozen=True)
class ChunkExchange:
    """The exchanges of a chunk of tokens, of which each member of the `sequence` axis has a share.

    Args:
        num_members: U.
    """

    num_members: int

    def heads_by_member(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """q [B, C / U, N, H], k and v [B, C / U, K, H] to [U, C / U, B, ...], as they are sent."""
        spread = spread_heads(q, k, v, self.num_members)
        q, k, v = map(_Group(self.num_members, 1).by_member, spread)
        return q, k, v

    def to_heads(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """What `heads_by_member` returns to the chunk's [B, C, ...] of some heads."""
        group = _Group(self.num_members, 1)
        q, k, v = (jnp.swapaxes(group.exchange_heads(x), 0, 1) for x in (q, k, v))
        return q, k, v

    def to_tokens(self, o: Array, num_heads: int) -> Array:
        """o [B, C, N', H] to [B, C / U, N, H], N = `num_heads`."""
        o = _Group(self.num_members, 1).to_sequence(jnp.swapaxes(o, 0, 1))
        return o[:, :, :num_heads]

    def whole_chunk(self, x: Array) -> Array:
        """[B, C / U] of each member to [B, C]."""
        return _Group(self.num_members, 1).gather(x)


def _check_block_layout(
    context: AttentionContext,
    num_heads: int,
    num_members: int,
) -> None:
    """Raises InputError unless each member's heads have the layout of blocks of the whole model's.

    A head's blocks depend on its number modulo the stride.
    """
    if context.layout is None:
        return
    stride = context.layout.stride
    if num_heads % (num_members * stride):
        equation = f"N % (sequence / ring * {stride}) == 0"
        expected = f"{equation} for heads to keep their layout of blocks"
        raise InputError("num_heads", num_heads, expected)


def _rows_as_heads(
    attention: Callable,
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    cache: Any,
) -> tuple[Array, Any]:
    """Attention [T, B, N / U, H] of rows that all have one mask.

    They may stand as more heads of one row, which transposes nothing.
    """
    context = dataclasses.replace(context, positions=context.positions[:1])
    as_heads = (_as_one_row(x) for x in (q, k, v))
    o, cache = attention(*as_heads, context, cache)
    return o.reshape(q.shape), cache


def _as_one_row(x: Array) -> Array:
    """[T, B, N / U, H] to [1, T, B N / U, H]."""
    length, head_dim = x.shape[0], x.shape[-1]
    return x.reshape(1, length, -1, head_dim)


def _rows_first(
    attention: Callable,
    q: Array,
    k: Array,
    v: Array,
    context: AttentionContext,
    cache: Any,
) -> tuple[Array, Any]:
    """Attention [T, B, N / U, H] of rows with documents of their own."""
    by_row = (jnp.swapaxes(x, 0, 1) for x in (q, k, v))
    o, cache = attention(*by_row, context, cache)
    return jnp.swapaxes(o, 0, 1), cache


@dataclasses.dataclass(frozen=True)
class _Group:
    """The exchanges among the members that share out the heads.

    Args:
        num_members: U.
        ring: such groups on the `sequence` axis.
    """

    num_members: int
    ring: int

    def to_heads(self, x: Array) -> Array:
        """[B, T / U, N, H] to [T, B, N / U, H]."""
        return self.exchange_heads(self.by_member(x))

    def by_member(self, x: Array) -> Array:
        """[B, T / U, N, H] to [U, T / U, B, N / U, H]; all that is sent to a member is together."""
        num_rows, num_own, _, head_dim = x.shape
        by_member = x.reshape(num_rows, num_own, self.num_members, -1, head_dim)
        return by_member.transpose(2, 1, 0, 3, 4)

    def exchange_heads(self, x: Array) -> Array:
        """[U, T / U, B, N / U, H], by member, to [T, B, N / U, H]."""
        received = self._exchange(x)
        return received.reshape(-1, *x.shape[2:])

    def to_sequence(self, o: Array) -> Array:
        """[T, B, N / U, H] to [B, T / U, N, H]."""
        length, num_rows, num_local, head_dim = o.shape
        by_member = o.reshape(self.num_members, -1, num_rows, num_local, head_dim)
        received = self._exchange(by_member)
        by_token = received.transpose(2, 1, 0, 3, 4)
        return by_token.reshape(num_rows, length // self.num_members, -1, head_dim)

    def gather(self, x: Array | None) -> Array | None:
        """[B, T / U] of each member to [B, T]."""
        if x is None:
            return None
        return lax.all_gather(x, SEQUENCE, axis=1, axis_index_groups=self._members(), tiled=True)

    def _exchange(self, x: Array) -> Array:
        """[U, ...]: sends part i to member i, which has it as the part of this member's number."""
        # Flat, because XLA sends an array of more dims in another order and transposes what
        # arrives.
        flat = x.reshape(self.num_members, -1)
        received = lax.all_to_all(
            flat,
            SEQUENCE,
            0,
            0,
            axis_index_groups=self._members(),
            tiled=True,
        )
        return checkpoint_name(received.reshape(x.shape), EXCHANGED)

    def _members(self) -> list[list[int]] | None:
        """The places on the axis of each group's members; None where one group takes all of it."""
        if self.ring == 1:
            return None
        num = self.num_members
        return [list(range(first, first + num)) for first in range(0, self.ring * num, num)]


def num_spread(
    num_heads: int,
    num_kv_heads: int,
    num_members: int,
) -> int:
    """Kv heads, their copies included, that `spread_heads` shares out, before it pads them."""
    num = math.lcm(num_kv_heads, num_members)
    is_even = num_heads % num_members == 0 and num_heads % num == 0
    return num if is_even else num_heads


def spread_heads(
    q: Array,
    k: Array,
    v: Array,
    num_members: int,
) -> tuple[Array, Array, Array]:
    """Repeats and pads heads so that U members get equal shares, kv heads beside their queries.

    Args:
        q: [B, T, N, H].
        k, v: [B, T, K, H].
        num_members: U.
    Returns:
        q [B, T, N', H], k and v [B, T, K', H]; U divides both, and N' / K' queries read a kv head.
    """
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    copies = num_spread(num_heads, num_kv_heads, num_members) // num_kv_heads
    k = jnp.repeat(k, copies, axis=2)
    v = jnp.repeat(v, copies, axis=2)
    num_missing = -num_heads % num_members
    if num_missing == 0:
        return q, k, v
    padding = ((0, 0), (0, 0), (0, num_missing), (0, 0))
    return jnp.pad(q, padding), jnp.pad(k, padding), jnp.pad(v, padding)
