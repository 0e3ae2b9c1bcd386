"""Ulysses: each device keeps its share of the sequence everywhere but in attention, where it has a share of the heads.

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


def ulysses(attention: Callable, *, num_members: int, ring: int = 1) -> Callable:
    """Wraps a single-device attention for members that hold consecutive shares of a sequence.

    Queries, keys and values change from shares of the sequence to shares of the heads and the
    output back, by all-to-all; the wrapped attention sees all the members' tokens in order, so
    windows, documents and soft-caps are its own affair. Without documents it sees all rows as the
    heads of one. Grouped queries need every kv head beside
    its query heads: with P members and K kv heads each is repeated lcm(K, P) / K times; where that
    does not divide the heads, keys become as many as queries and both are filled up with heads that
    nobody reads. The gradient of a repeated head is the sum of its copies' by transposition.

    Args:
        attention: (q, k, v, context, cache) -> (o, cache).
        num_members: P, devices that exchange heads, neighbours on the `sequence` axis.
        ring: groups of P on the axis, which `attention` connects.
    Returns:
        The same on local q [B, T / P, N, H], k and v [B, T / P, K, H] and their context. It raises
        InputError for heads that would not keep the layout of blocks that their number gives them.
    Cost: of q and o together 2 N and of k and v 2 lcm(K, P) heads of B T / P tokens leave a device,
        forward, less the P-th part that stays: 4 N for multi-head.
    """
    members = [[r * num_members + i for i in range(num_members)] for r in range(ring)]
    groups = dict(axis_index_groups=members if ring > 1 else None, tiled=True)

    def exchange(x: Array) -> Array:
        """[P, ...]: the i-th part to member i, which finds it as its part of this member's number."""
        flat = x.reshape(
            num_members, -1
        )  # else XLA sends another order of dims and transposes what arrives
        return checkpoint_name(
            lax.all_to_all(flat, SEQUENCE, 0, 0, **groups).reshape(x.shape), EXCHANGED
        )

    def to_heads(x: Array) -> Array:
        """[B, T / P, N, H] to [T, B, N / P, H]; all that is sent to a member lies together."""
        num_rows, num_own, _, head_dim = x.shape
        by_member = x.reshape(num_rows, num_own, num_members, -1, head_dim).transpose(2, 1, 0, 3, 4)
        return exchange(by_member).reshape(num_members * num_own, num_rows, -1, head_dim)

    def to_sequence(o: Array) -> Array:
        """[T, B, N / P, H] to [B, T / P, N, H]."""
        length, num_rows, num_local, head_dim = o.shape
        by_member = exchange(o.reshape(num_members, -1, num_rows, num_local, head_dim))
        return by_member.transpose(2, 1, 0, 3, 4).reshape(
            num_rows, length // num_members, -1, head_dim
        )

    def whole(x: Array | None) -> Array | None:
        return None if x is None else lax.all_gather(x, SEQUENCE, axis=1, **groups)

    def exchanged(
        q: Array, k: Array, v: Array, context: AttentionContext, cache: Any
    ) -> tuple[Array, Any]:
        num_heads = q.shape[2]
        if context.layout is not None and num_heads % (num_members * context.layout.stride):
            expected = f"N % (sequence / ring * {context.layout.stride}) == 0 for heads to keep their layout of blocks"
            raise InputError("num_heads", num_heads, expected)
        q, k, v = map(to_heads, spread_heads(q, k, v, num_members))
        context = dataclasses.replace(
            context, positions=whole(context.positions), segments=whole(context.segments)
        )
        if context.segments is None:
            # All rows have one mask, so that they may stand as more heads of one row: nothing is
            # transposed.
            context = dataclasses.replace(context, positions=context.positions[:1])
            o, cache = attention(
                *(x.reshape(1, len(x), -1, x.shape[-1]) for x in (q, k, v)), context, cache
            )
            o = o.reshape(q.shape)
        else:
            o, cache = attention(*(jnp.swapaxes(x, 0, 1) for x in (q, k, v)), context, cache)
            o = jnp.swapaxes(o, 0, 1)
        return to_sequence(o)[:, :, :num_heads], cache

    return exchanged


def spread_heads(q: Array, k: Array, v: Array, num_members: int) -> tuple[Array, Array, Array]:
    """Repeats and fills up heads so that each of P members gets equal shares, with the kv heads its queries read.

    Args:
        q: [B, T, N, H].
        k, v: [B, T, K, H].
        num_members: P.
    Returns:
        q [B, T, N', H], k and v [B, T, K', H]; P divides both, and N' / K' queries read a kv head.
    """
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    spread = math.lcm(num_kv_heads, num_members)
    if num_heads % num_members or num_heads % spread:
        spread = num_heads
    k, v = (jnp.repeat(x, spread // num_kv_heads, axis=2) for x in (k, v))
    missing = -num_heads % num_members
    if not missing:
        return q, k, v
    return tuple(jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) for x in (q, k, v))
