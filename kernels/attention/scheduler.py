"""Which item of work a block of the attention kernels takes next.

An item is one tile of one head of one row. Blocks work on few heads at a time, so that what these
share stays in the L2 cache, and take the longest tiles of those heads first, so that all blocks end
together.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.persistent import NUM_SMS

# Bytes that the heads in work may share; the L2 cache has 50 MiB.
CACHE = 32 * 2**20
# Item numbers of a block that can be on their way from the fetching warpgroup to the others: it is
# up to two items ahead.
SLOTS = 4


def longest_first(table: Array, num_patterns: int) -> Array:
    """The order in which to take tiles, so that blocks end together.

    Args:
        table: [rows or patterns, tiles, 4], as `tiles` makes it.
        num_patterns: those of a block-sparse layout; 0 without one.
    Returns:
        [rows or 1, tiles] int32: the tiles with most visits first. Patterns share one order, by the
        sum of their visits.
    """
    lengths = table[..., 1] - table[..., 0]
    if num_patterns:
        lengths = lengths.sum(0, keepdims=True)
    return jnp.argsort(-lengths, stable=True).astype(jnp.int32)


def item_at(
    order: Any,
    number: Any,
    batch: int,
    heads: int,
    head_bytes: int,
) -> tuple[Any, ...]:
    """The `number`-th item of work.

    Args:
        order: the result of `longest_first`.
        number: of the item.
        batch, heads: how many rows there are, and heads of each.
        head_bytes: bytes that the tiles of one head share. As many heads as fit in the cache are
            worked on together.
    Returns:
        (row, head, row of the intervals, tile).
    """
    interval_rows, num_tiles = order.shape
    together = max(CACHE // head_bytes, 1)
    first = lax.div(number, num_tiles * together) * together
    rest = number - first * num_tiles
    # The last heads may be fewer than fit.
    heads_now = jnp.minimum(batch * heads - first, together)
    head = first + lax.rem(rest, heads_now)
    row = lax.div(head, heads)
    interval_row = row if interval_rows > 1 else 0
    head_of_row = lax.rem(head, heads)
    tile = order[interval_row, lax.div(rest, heads_now)]
    return row, head_of_row, interval_row, tile


def make_queue(interpret: Any) -> Any:
    """Global memory, all zeros, through which blocks ask for items.

    Its first number counts the items that were handed out after the first of each block. Behind it
    lie SLOTS numbers for each block: the items that the block was given.
    """
    if interpret:
        return None
    return pl.get_global(plgpu.SemaphoreType.REGULAR((1 + NUM_SMS * SLOTS,)))


def over_items(
    num_items: int,
    body: Callable,
    queue: Any,
    ready: Any,
    *,
    is_fetching: bool,
) -> Any:
    """Loops over the items that this block gets.

    The first item is the block's own number. From then on each block asks for another when it has
    fetched one, so that all end together however long items take. Interpretation knows no atomic
    addition: there blocks take items in turn.

    Args:
        num_items: of all blocks.
        body: (i, number, count) -> count after the block's i-th item, which has this number.
        queue: the result of `make_queue`.
        ready: SLOTS barriers by which the fetching warpgroup tells the others that a number has
            come.
        is_fetching: whether this warpgroup is the one that fetches and asks for items.
    Returns:
        (number of items that this block got, a number past the last item, the last count).
    """
    block, num_blocks = lax.axis_index("sm"), lax.axis_size("sm")

    def is_left(state):
        _, number, _ = state
        return number < num_items

    def do_item(state):
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
        i = i + 1
        if queue is not None:
            number = _number_at(queue.at[place])
        return i, num_blocks + number, count

    return lax.while_loop(is_left, do_item, (jnp.int32(0), block, jnp.int32(0)))


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def _count_up(_, counter, target):
    """Adds one to the counter, and stores its old value where all threads of the block read it."""
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
    """The number stored there, the same for all threads of a warpgroup."""
    # Every lane takes what the first of its warp read. Otherwise ptxas thinks that lanes diverge
    # and serialises all products (warning C7520).
    number = mgpu.utils.inline_ptx(
        "{ .reg .u32 read; ld.u32 read, [$1]; shfl.sync.idx.b32 $0, read, 0, 31, -1; }",
        mgpu.utils.memref_ptr(source),
        result_types=source.type.element_type,
        has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(number, (), is_signed=True)
