"""What the backward of attention is compiled for: sizes, the division of work, shared memory."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.products import interpreted_buffers
from jaxscale.kernels.attention.scheduler import SLOTS, item_at
from jaxscale.kernels.persistent import (
    COMPUTE,
    ROWS,
    TILE_ROWS,
    part,
    swizzled,
)

QUERIES = 64  # in a tile
STAGES = 2  # tiles of queries, and of the output's gradients, in shared memory


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and settings that a kernel is compiled for.

    Args:
        num_queries, num_keys: T and S.
        batch: number of rows.
        kv_heads: K.
        groups: query heads that read one kv head.
        head_dim: H.
        scale: factor on the logits.
        softcap: c in c * tanh(logits / c); None for none.
        num_patterns: patterns of a block-sparse layout; 0 without one.
    """

    num_queries: int
    num_keys: int
    batch: int
    kv_heads: int
    groups: int
    head_dim: int
    scale: float
    softcap: float | None
    num_patterns: int

    @property
    def is_wide(self) -> bool:
        """Whether the warpgroups divide the columns of dk and dv rather than the keys."""
        return self.head_dim > 128

    @property
    def is_early(self) -> bool:
        """Whether the next tile's logits are computed beside the gradient of q, not after it.

        Wider heads lack the registers. For heads of 64 it is slower: 323 TFLOP/s against 389 on an
        H200.
        """
        return self.head_dim in (96, 128)

    @property
    def keys(self) -> int:
        """Keys in a tile."""
        return ROWS if self.is_wide else TILE_ROWS

    @property
    def num_tiles(self) -> int:
        """Tiles of keys in a row."""
        return pl.cdiv(self.num_keys, self.keys)

    @property
    def columns(self) -> int:
        """Columns of dk and dv that a warpgroup sums up."""
        return self.head_dim // COMPUTE if self.is_wide else self.head_dim

    @property
    def dq_columns(self) -> int:
        """Columns of dq that a warpgroup computes.

        Half of them, for all keys of the tile. Heads too narrow for that have all columns computed
        by each warpgroup, for its own keys.
        """
        return self.head_dim // COMPUTE if self.head_dim > 64 else self.head_dim

    @property
    def row_bytes(self) -> int:
        """Of a tile of shared memory: a multiple of them makes the columns of dq."""
        return 128 if self.dq_columns % 64 == 0 else 32

    @property
    def staged_columns(self) -> int:
        """Columns of dq that are in shared memory at a time, which has room for no more."""
        return 32 if self.is_wide else self.dq_columns

    def share(self, warpgroup: Any) -> tuple[Any, ...]:
        """What of dk and dv a warpgroup sums up: (block of the tile's keys, its rows, columns)."""
        if self.is_wide:
            return 0, slice(None), part(warpgroup, self.columns)
        return warpgroup, part(warpgroup, ROWS), slice(None)

    @property
    def num_items(self) -> int:
        """Tiles of keys of all heads and rows."""
        return self.num_tiles * self.batch * self.kv_heads

    def item_at(
        self,
        order: Any,
        number: Any,
    ) -> tuple[Any, ...]:
        """(row, kv head, row of the intervals, tile)."""
        # Bytes of q, do and dq of the one query head in work.
        head_bytes = self.num_queries * self.head_dim * (2 + 2 + 4)
        return item_at(order, number, self.batch, self.kv_heads, head_bytes)

    def tiles_of(
        self,
        table: Any,
        head: Any,
        row: Any,
        tile: Any,
    ) -> tuple[Any, ...]:
        """(place in `table`, tiles of queries to visit) of one query head."""
        table_row = lax.rem(head, self.num_patterns) if self.num_patterns else row
        place = table_row, tile
        return place, tuple(table[(*place, field)] for field in range(4))


class Refs(NamedTuple):
    """A kernel's references: to its operands and results in global memory, then to its scratch."""

    # How work is divided: `scheduler.longest_first`, and what `tiles` makes of the mask.
    order: Any
    table: Any
    entries: Any
    low: Any
    high: Any
    lse: Any
    delta: Any
    q: Any
    k: Any
    v: Any
    do: Any
    dq: Any
    dk: Any
    dv: Any
    # Shared memory: `bounds` are low and high, `sums` are lse and delta.
    k_smem: Any
    v_smem: Any
    q_smem: Any
    do_smem: Any
    ds_smem: Any
    dq_smem: Any
    bounds_smem: Any
    sums_smem: Any
    # Barriers: copies have come, or both warpgroups are done with what came.
    kv_full: Any
    kv_empty: Any
    q_full: Any
    do_full: Any
    empty: Any
    # Barriers between the two warpgroups: both have stored ds; both have got to the same point.
    ds_full: Any
    done: Any
    # Barriers: the number of the next item has come.
    ready: Any
    # What interpretation needs.
    p_smem: Any = None


def scratch_types(
    problem: Problem,
    dtype: Any,
    interpret: Any,
) -> tuple[Any, ...]:
    """Shared memory and barriers in the order of `Refs`."""
    keys, head_dim = problem.keys, problem.head_dim
    dq_shape = COMPUTE, QUERIES, problem.staged_columns
    row_bytes = problem.row_bytes
    return (
        swizzled((1, keys, head_dim), dtype, row_bytes),
        swizzled((1, keys, head_dim), dtype, row_bytes),
        swizzled((STAGES, QUERIES, head_dim), dtype, row_bytes),
        swizzled((STAGES, QUERIES, head_dim), dtype, row_bytes),
        swizzled((2, keys, QUERIES), dtype, row_bytes),
        swizzled(dq_shape, jnp.float32, 128 if problem.staged_columns % 32 == 0 else 64),
        # Two vectors share one buffer, because each buffer takes whole KiBs.
        plgpu.SMEM((2, STAGES, QUERIES), jnp.int32),
        plgpu.SMEM((2, STAGES, QUERIES), jnp.float32),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=COMPUTE),
        plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=COMPUTE),
        plgpu.Barrier(num_arrivals=COMPUTE),
        plgpu.Barrier(num_barriers=SLOTS),
        *interpreted_buffers(interpret, (ROWS, QUERIES), dtype=dtype),
    )
