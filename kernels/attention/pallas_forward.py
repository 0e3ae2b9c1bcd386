"""The forward of attention for Hopper GPUs, as a Pallas kernel for Mosaic GPU.

Two warpgroups multiply, each for 64 queries, and one fetches. A warpgroup gives the tensor cores
the logits of the next tile of keys together with the product of this one's probabilities and
values, and makes the softmax of the former while the latter runs; the warpgroups take turns, so
that one's softmax also runs beside the other's products.

Source: Dao 2023 (arXiv 2307.08691), algorithm 1; Shah et al. 2024 (arXiv 2407.08608), section 3.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.products import (
    MATRIX,
    ROW,
    accumulate,
    interpreted_buffers,
    minus_infinity,
    multiply,
    spread,
    tanh,
    visit_at,
)
from jaxscale.kernels.attention.scheduler import (
    SLOTS,
    item_at,
    longest_first,
    make_queue,
    over_items,
)
from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout, key_tiles, key_visits
from jaxscale.kernels.persistent import COMPUTE, LOG2E, NUM_SMS, ROWS, SWIZZLED, make_kernel

QUERIES = COMPUTE * ROWS
STAGES = 2  # tiles of keys and of values in shared memory


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and settings that a kernel is compiled for.

    Args:
        num_tiles: tiles of queries in a row.
        batch, num_heads, groups: query heads of a kv head.
        head_bytes: of a kv head's keys and values, for each of its query heads.
        keys: in a tile.
        query_slots: tiles of queries in shared memory.
        scale, softcap: of the logits.
        num_patterns: of a block-sparse layout; 0 without one.
    """

    num_tiles: int
    batch: int
    num_heads: int
    groups: int
    head_bytes: int
    keys: int
    query_slots: int
    scale: float
    softcap: float | None
    num_patterns: int

    @property
    def num_items(self) -> int:
        """Tiles of queries of all heads and rows."""
        return self.num_tiles * self.batch * self.num_heads

    def item_at(self, order: Any, table: Any, number: Any) -> tuple[Any, ...]:
        """(row, head, row of the intervals, place in `table`, its tiles)."""
        b, head, row, tile = item_at(order, number, self.batch, self.num_heads, self.head_bytes)
        place = lax.rem(head, self.num_patterns) if self.num_patterns else row, tile
        return b, head, row, place, tuple(table[(*place, field)] for field in range(4))


@functools.partial(
    jax.jit, static_argnames=("scale", "softcap", "layout", "interpret")
)  # lowered once for all layers
def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    low: jax.Array,
    high: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of every query t over the keys low[t] <= s < high[t], which are those of a causal mask with a layout.

    Args:
        q: [B, T, N, H], H one of 64, 128 and 256.
        k, v: [B, S, K, H].
        low, high: [B or 1, T] int32.
    Returns:
        (o [B, T, N, H], lse [B, N, T] float32); 0 and -inf where a query sees nothing.
    """
    batch, length, num_heads, head_dim = q.shape
    padded = pl.cdiv(length, QUERIES) * QUERIES
    low, high = (jnp.pad(x, ((0, 0), (0, padded - length))) for x in (low, high))
    is_wide = head_dim > 128  # then shared memory holds half of the keys, and one tile of queries
    groups = num_heads // k.shape[2]
    problem = Problem(
        padded // QUERIES,
        batch,
        num_heads,
        groups,
        2 * 2 * k.shape[1] * head_dim // groups,
        BLOCK if is_wide or layout else 128,
        1 if is_wide else 2,
        scale,
        softcap,
        layout.stride if layout else 0,
    )
    if layout:
        table, entries = map(
            jnp.asarray, key_visits(layout, padded // BLOCK, pl.cdiv(k.shape[1], BLOCK))
        )
    else:
        table, entries = (
            key_tiles(low, high, queries=QUERIES, keys=problem.keys),
            jnp.zeros((1, 1, 1), jnp.int32),
        )

    def body(*refs):
        refs = _Refs(*refs, *[None] * (len(_FIELDS) - len(refs)))
        queue = make_queue(interpret)
        pl.when(lax.axis_index("warpgroup") == COMPUTE)(lambda: _fetch(refs, problem, queue))
        pl.when(lax.axis_index("warpgroup") < COMPUTE)(
            lambda: _compute(refs, problem, queue, interpret)
        )

    slots = problem.query_slots
    o, lse = make_kernel(
        body,
        (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, padded), jnp.float32),
        ),
        (
            plgpu.SMEM((slots, QUERIES, head_dim), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((STAGES, problem.keys, head_dim), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((STAGES, problem.keys, head_dim), q.dtype, transforms=SWIZZLED),
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
            *interpreted_buffers(interpret, (ROWS, problem.keys), dtype=q.dtype),
        ),
        2 if interpret else NUM_SMS,
        interpret,
    )(longest_first(table, problem.num_patterns), table, entries, low, high, q, k, v)
    return o, lse[:, :, :length]


_FIELDS = (
    "order",
    "table",
    "entries",
    "low",
    "high",
    "q",
    "k",
    "v",
    "o",
    "lse",
    "q_smem",
    "k_smem",
    "v_smem",
    "low_smem",
    "high_smem",
    "lse_smem",
    "q_full",
    "q_empty",
    "k_full",
    "k_empty",
    "v_full",
    "v_empty",
    "turn",
    "ready",
    "p_smem",
)
_Refs = dataclasses.make_dataclass("_Refs", _FIELDS)


def _fetch(refs: Any, problem: Problem, queue: Any) -> None:
    plgpu.set_max_registers(24, action="decrease")
    keys, slots = problem.keys, problem.query_slots

    def one(i, number, count):
        b, head, row, place, (first, end, *_) = problem.item_at(refs.order, refs.table, number)
        slot = lax.rem(i, slots)
        pl.when(i >= slots)(lambda: plgpu.barrier_wait(refs.q_empty.at[slot]))
        queries = pl.ds(place[1] * QUERIES, QUERIES)
        for source, target in (
            (refs.q.at[b, queries, head], refs.q_smem),
            (refs.low.at[row, queries], refs.low_smem),
            (refs.high.at[row, queries], refs.high_smem),
        ):
            plgpu.copy_gmem_to_smem(source, target.at[slot], refs.q_full.at[slot])

        def step(j, count):
            slot = lax.rem(count, STAGES)
            tile, _ = visit_at(refs.entries, problem.num_patterns, place, end - 1 - j)
            where = b, pl.ds(tile * keys, keys), lax.div(head, problem.groups)
            for source, target, full, empty in (
                (refs.k, refs.k_smem, refs.k_full, refs.k_empty),
                (refs.v, refs.v_smem, refs.v_full, refs.v_empty),
            ):
                pl.when(count >= STAGES)(lambda empty=empty: plgpu.barrier_wait(empty.at[slot]))
                plgpu.copy_gmem_to_smem(source.at[where], target.at[slot], full.at[slot])
            return count + 1

        return lax.fori_loop(0, end - first, step, count)

    num_mine, _, count = over_items(problem.num_items, one, queue, refs.ready, is_fetching=True)
    for slot in range(STAGES):  # a barrier may go only when all that happened to it has been seen
        for barrier in (refs.k_empty, refs.v_empty):
            pl.when(count > slot)(
                lambda slot=slot, barrier=barrier: plgpu.barrier_wait(barrier.at[slot])
            )
    for slot in range(slots):
        pl.when(num_mine > slot)(lambda slot=slot: plgpu.barrier_wait(refs.q_empty.at[slot]))


def _compute(refs: Any, problem: Problem, queue: Any, interpret: Any) -> None:
    plgpu.set_max_registers(240, action="increase")
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(refs.turn.at[0]))

    def one(i, number, count):
        b, head, _, place, tiles = problem.item_at(refs.order, refs.table, number)
        slot = lax.rem(i, problem.query_slots)
        mine = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
        q_mine = refs.q_smem.at[slot, mine]
        plgpu.barrier_wait(refs.q_full.at[slot])

        def store(o, lse):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            q_mine[...] = o.astype(q_mine.dtype)
            refs.lse_smem[mine] = lse
            plgpu.commit_smem()
            own = pl.ds(place[1] * QUERIES + warpgroup * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(q_mine, refs.o.at[b, own, head])
            plgpu.copy_smem_to_gmem(refs.lse_smem.at[mine], refs.lse.at[b, head, own])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(refs.q_empty.at[slot])

        first, end = tiles[:2]
        zeros = plgpu.layout_cast(jnp.zeros(q_mine.shape, jnp.float32), MATRIX)

        @pl.when(end > first)
        def _():
            softmax = functools.partial(_softmax, refs, problem, place, slot)
            store(*_attend(refs, problem, q_mine, tiles, count, zeros, softmax, interpret))

        pl.when(end == first)(lambda: store(zeros, minus_infinity(ROWS)))
        return count + end - first

    over_items(problem.num_items, one, queue, refs.ready, is_fetching=False)
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(refs.turn.at[0]))
    plgpu.wait_smem_to_gmem(0)


def _softmax(refs: Any, problem: Problem, place, slot, logits, top, number, is_masked):
    """(exponentials, their sums, what the old sums shrink by, the new maxima), of logits before scale and soft-cap."""
    factor, cap = problem.scale * LOG2E, problem.softcap
    if cap is not None:
        logits, factor = tanh(logits * (problem.scale / cap)), cap * LOG2E
    if is_masked:
        warpgroup = lax.axis_index("warpgroup")
        tile, is_seen = visit_at(refs.entries, problem.num_patterns, place, number)
        key = (
            plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=MATRIX) + tile * problem.keys
        )
        mine = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
        below, above = (
            plgpu.load(ref.at[slot, mine], layout=ROW) for ref in (refs.low_smem, refs.high_smem)
        )
        below, above = (
            spread(values, logits.shape, 0) for values in (below, above * is_seen(warpgroup))
        )
        logits = jnp.where((key >= below) & (key < above), logits, -jnp.inf)
    new = jnp.maximum(top, logits.max(axis=1) * factor)
    safe = jnp.where(new == -jnp.inf, 0.0, new) if is_masked else new
    p = jnp.exp2(logits * factor - spread(safe, logits.shape, 0))
    return p, p.sum(axis=1), jnp.exp2(top - safe), new


def _attend(refs: Any, problem: Problem, q_mine, tiles, count, zeros, softmax, interpret):
    """(output, log of the sum of exponentials) of this warpgroup's queries; the last tile of keys comes first."""
    first, end, whole_first, whole_end = tiles
    warpgroup = lax.axis_index("warpgroup")
    logits_type = plgpu.ACC((ROWS, problem.keys), jnp.float32)
    p_mine = None if refs.p_smem is None else refs.p_smem.at[warpgroup]

    def logits_of(s_ref, slot):
        plgpu.barrier_wait(refs.k_full.at[slot])
        plgpu.barrier_wait(refs.turn.at[warpgroup])
        plgpu.wgmma(s_ref, q_mine, refs.k_smem.at[slot].transpose((1, 0)))

    def your_turn():
        plgpu.barrier_arrive(refs.turn.at[1 - warpgroup])

    def begin(s_ref):
        slot = lax.rem(count, STAGES)
        logits_of(s_ref, slot)
        your_turn()
        logits = s_ref[...]
        plgpu.barrier_arrive(refs.k_empty.at[slot])
        return softmax(logits, minus_infinity(ROWS), end - 1, True)

    def step(is_masked, j, carry):
        acc, p, total, top = carry
        now, before = lax.rem(count + j, STAGES), lax.rem(count + j - 1, STAGES)

        def products(acc_ref):
            def scores(s_ref):
                logits_of(s_ref, now)
                plgpu.barrier_wait(refs.v_full.at[before])
                multiply(acc_ref, p, refs.v_smem.at[before], p_mine)
                your_turn()
                logits = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                plgpu.barrier_arrive(refs.k_empty.at[now])
                return softmax(logits, top, end - 1 - j, is_masked)

            return pl.run_scoped(scores, logits_type)

        like = p.astype(jnp.float32), total, top, top
        (acc,), (wide, total_new, shrink, top) = accumulate(
            (acc,), products, like, interpret=interpret
        )
        # Not before the product is done, which reads the old ones from the same registers.
        p = lax.optimization_barrier(wide).astype(p.dtype)
        plgpu.barrier_arrive(refs.v_empty.at[before])
        return acc * spread(shrink, acc.shape, 0), p, total * shrink + total_new, top

    def finish(acc, p):
        before = lax.rem(count + end - first - 1, STAGES)

        def product(acc_ref):
            plgpu.barrier_wait(refs.v_full.at[before])
            plgpu.barrier_wait(refs.turn.at[warpgroup])
            multiply(acc_ref, p, refs.v_smem.at[before], p_mine)
            your_turn()
            return ()

        (acc,), _ = accumulate((acc,), product, (), interpret=interpret)
        plgpu.barrier_arrive(refs.v_empty.at[before])
        return acc

    p, total, _, top = pl.run_scoped(begin, logits_type)
    carry = zeros, p.astype(q_mine.dtype), total, top
    for lower, upper, is_masked in (
        (1, end - whole_end, True),
        (jnp.maximum(end - whole_end, 1), end - whole_first, False),
        (jnp.maximum(end - whole_first, 1), end - first, True),
    ):
        carry = lax.fori_loop(lower, upper, functools.partial(step, is_masked), carry)
    acc, p, total, top = carry
    acc = finish(acc, p)
    total = jnp.where(total == 0.0, 1.0, total)  # a query that sees nothing: zero, and -inf
    return acc * spread(1 / total, acc.shape, 0), top * (1 / LOG2E) + jnp.log(total)
