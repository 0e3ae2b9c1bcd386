"""What the forward of attention is compiled for: sizes, the division of work, shared memory."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.products import interpreted_buffers
from jaxscale.kernels.attention.scheduler import SLOTS, item_at
from jaxscale.kernels.persistent import COMPUTE, ROWS, TILE_ROWS, swizzled

QUERIES = TILE_ROWS  # in a tile
STAGES = 2  # tiles of keys, and of values, in shared memory


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and settings that a kernel is compiled for.

    Args:
        num_tiles: tiles of queries in a row.
        batch: number of rows.
        num_heads: number of query heads.
        groups: query heads that read one kv head.
        head_dim: H.
        head_bytes: bytes of a kv head's keys and values, divided among its query heads.
        keys: keys in a tile.
        query_slots: tiles of queries in shared memory.
        scale: factor on the logits.
        softcap: c in c * tanh(logits / c); None for none.
        num_patterns: patterns of a block-sparse layout; 0 without one.
    """

    num_tiles: int
    batch: int
    num_heads: int
    groups: int
    head_dim: int
    head_bytes: int
    keys: int
    query_slots: int
    scale: float
    softcap: float | None
    num_patterns: int

    @property
    def row_bytes(self) -> int:
        """Of a tile of shared memory: a multiple of them makes a head."""
        return 128 if self.head_dim % 64 == 0 else 64

    @property
    def num_items(self) -> int:
        """Tiles of queries of all heads and rows."""
        return self.num_tiles * self.batch * self.num_heads

    def item_at(
        self,
        order: Any,
        table: Any,
        number: Any,
    ) -> tuple[Any, ...]:
        """(row, head, row of the intervals, place in `table`, tiles of keys to visit)."""
        b, head, row, tile = item_at(order, number, self.batch, self.num_heads, self.head_bytes)
        table_row = lax.rem(head, self.num_patterns) if self.num_patterns else row
        place = table_row, tile
        tiles = tuple(table[(*place, field)] for field in range(4))
        return b, head, row, place, tiles


class Refs(NamedTuple):
    """A kernel's references: to its operands and results in global memory, then to its scratch."""

    # How work is divided: `scheduler.longest_first`, and what `tiles` makes of the mask.
    order: Any
    table: Any
    entries: Any
    low: Any
    high: Any
    q: Any
    k: Any
    v: Any
    o: Any
    lse: Any
    # Shared memory.
    q_smem: Any
    k_smem: Any
    v_smem: Any
    low_smem: Any
    high_smem: Any
    lse_smem: Any
    # Barriers: a slot's copies have come; both warpgroups are done with it.
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    # Barriers: a warpgroup may use the tensor cores; the number of the next item has come.
    turn: Any
    ready: Any
    # What interpretation needs.
    p_smem: Any = None


def scratch_types(
    problem: Problem,
    dtype: Any,
    interpret: Any,
) -> tuple[Any, ...]:
    """Shared memory and barriers in the order of `Refs`."""
    slots, keys, head_dim = problem.query_slots, problem.keys, problem.head_dim
    row_bytes = problem.row_bytes
    return (
        swizzled((slots, QUERIES, head_dim), dtype, row_bytes),
        swizzled((STAGES, keys, head_dim), dtype, row_bytes),
        swizzled((STAGES, keys, head_dim), dtype, row_bytes),
        plgpu.SMEM((slots, QUERIES), jnp.int32),
        plgpu.SMEM((slots, QUERIES), jnp.int32),
        plgpu.SMEM((QUERIES,), jnp.float32),
        plgpu.Barrier(num_arrivals=3, num_barriers=slots),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
        plgpu.Barrier(num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES),
        plgpu.Barrier(num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES),
        plgpu.Barrier(num_barriers=COMPUTE),
        plgpu.Barrier(num_barriers=SLOTS),
        *interpreted_buffers(interpret, (ROWS, keys), dtype=dtype),
    )
