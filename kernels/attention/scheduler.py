"""Which tile a block of the attention kernels takes next: the one whose head the others read now, the longest first."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.persistent import NUM_SMS

CACHE = (
    32 * 2**20
)  # bytes of the L2 cache of 50 MiB that the tiles in work may fill with what they share
SLOTS = (
    4  # numbers of a block that are handed over: the fetching warpgroup is up to two items ahead
)


def longest_first(table: jax.Array, num_patterns: int) -> jax.Array:
    """The order in which to take the tiles of `table` [rows or patterns, tiles, 4], so that blocks end together.

    Returns:
        [rows or 1, tiles] int32, those that visit most first; of patterns, by what all visit
        together.
    """
    lengths = table[..., 1] - table[..., 0]
    lengths = lengths.sum(0, keepdims=True) if num_patterns else lengths
    return jnp.argsort(-lengths, stable=True).astype(jnp.int32)


def item_at(order: Any, number: Any, batch: int, heads: int, head_bytes: int) -> tuple[Any, ...]:
    """(row, head, row of the intervals, tile) of an item of work, which is one tile of one head and row.

    Args:
        order: as `longest_first` gives it.
        head_bytes: that the tiles of a head share; as many heads as the cache holds are gone
            through together.
    """
    rows, num_tiles = order.shape
    together = max(CACHE // head_bytes, 1)
    first = lax.div(number, num_tiles * together) * together
    rest, heads_now = number - first * num_tiles, jnp.minimum(batch * heads - first, together)
    head = first + lax.rem(rest, heads_now)
    row = lax.div(head, heads)
    interval_row = row if rows > 1 else 0
    return row, lax.rem(head, heads), interval_row, order[interval_row, lax.div(rest, heads_now)]


def make_queue(interpret: Any) -> Any:
    """How many items were handed out after the first of each block, and the numbers that blocks were given: zeros."""
    return None if interpret else pl.get_global(plgpu.SemaphoreType.REGULAR((1 + NUM_SMS * SLOTS,)))


def over_items(num_items: int, body: Callable, queue: Any, ready: Any, *, is_fetching: bool) -> Any:
    """(items that this block got, whatever, the last count); `body(i, number, count)` gives the count after the i-th.

    The first item is the block's own number; then each block asks for another when it has fetched
    one, so that all end together however long items take. Interpreted, which knows no atomic
    addition, blocks take turns.

    Args:
        queue: of `make_queue`.
        ready: SLOTS barriers, through which the fetching warpgroup tells the others.
    """
    block, blocks = lax.axis_index("sm"), lax.axis_size("sm")

    def one(state):
        i, number, count = state
        count = body(i, number, count)
        slot = lax.rem(i, SLOTS)
        place = 1 + block * SLOTS + slot
        if is_fetching:
            if queue is not None:
                _count_up(queue.at[0], queue.at[place])
            plgpu.barrier_arrive(ready.at[slot])
        else:
            plgpu.barrier_wait(ready.at[slot])
        return i + 1, blocks + (number if queue is None else _number_at(queue.at[place])), count

    return lax.while_loop(
        lambda state: state[1] < num_items, one, (jnp.int32(0), block, jnp.int32(0))
    )


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def _count_up(_, counter, target):
    """Adds one to the counter, and stores what it was where all threads of the block read it."""
    mgpu.utils.inline_ptx(
        "{ .reg .u32 was; @$2 atom.relaxed.gpu.add.u32 was, [$0], 1; @$2 st.u32 [$1], was; }",
        mgpu.utils.memref_ptr(counter),
        mgpu.utils.memref_ptr(target),
        mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP),
        has_side_effects=True,
    )
    mgpu.warpgroup_barrier()


@plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),),
    return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT),
)
def _number_at(_, source):
    """What is stored there, the same for all threads of a warpgroup."""
    # Lanes take what the first of a warp read, or ptxas thinks that they diverge and serialises all
    # products (C7520).
    number = mgpu.utils.inline_ptx(
        "{ .reg .u32 read; ld.u32 read, [$1]; shfl.sync.idx.b32 $0, read, 0, 31, -1; }",
        mgpu.utils.memref_ptr(source),
        result_types=source.type.element_type,
        has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(number, (), is_signed=True)
