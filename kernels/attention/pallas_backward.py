"""The backward of attention for Hopper GPUs, as a Pallas kernel for Mosaic GPU.

A block keeps a tile of keys and values and the sums of their gradients, and goes over the queries
that see them: five products a step, of which the gradient of the queries is added in memory, in the
order in which blocks come to it; so its last bits differ from run to run. The logits of the next
tile of queries are made before a step's last products, so that the tensor cores have work while its
softmax is computed. A warpgroup sums for half of the tile's keys; where heads are wider than 128
that does not fit in its registers: it then sums half of the columns for all keys, and both make the
logits, seven products.

Source: Dao 2023 (arXiv 2307.08691), algorithm 2; Shah et al. 2024 (arXiv 2407.08608), appendix B.
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
    COLUMN,
    MATRIX,
    SWIZZLED_FLOAT32,
    accumulate,
    interpreted_buffers,
    multiply,
    over_runs,
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
from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout, query_tiles, query_visits
from jaxscale.kernels.persistent import COMPUTE, LOG2E, NUM_SMS, ROWS, SWIZZLED, make_kernel

QUERIES = 64
STAGES = 2  # tiles of queries and of their output's gradients in shared memory


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and settings that a kernel is compiled for; `groups` query heads read a kv head, otherwise as it says."""

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
        """Whether the warpgroups divide the columns of the gradients of keys and values, not the keys."""
        return self.head_dim > 128

    @property
    def is_early(self) -> bool:
        """Whether the next tile's logits are made beside the queries' gradient, not after it.

        Wider heads lack the registers; for heads of 64 it is slower, 323 TFLOP/s against 389 on an
        H200.
        """
        return self.head_dim == 128

    @property
    def keys(self) -> int:
        """In a tile."""
        return ROWS if self.is_wide else COMPUTE * ROWS

    @property
    def num_tiles(self) -> int:
        """Of keys in a row."""
        return pl.cdiv(self.num_keys, self.keys)

    @property
    def dq_columns(self) -> int:
        """Of the queries' gradient that a warpgroup makes, half of them over all keys; too narrow, all over its own."""
        return self.head_dim // COMPUTE if self.head_dim % 128 == 0 else self.head_dim

    @property
    def staged_columns(self) -> int:
        """Of those, how many are in shared memory at a time: what there is room for."""
        return 32 if self.is_wide else self.dq_columns

    def share(self, warpgroup: Any) -> tuple[Any, ...]:
        """(block of the tile's keys, as rows of the tile, columns) of which a warpgroup sums up the gradients."""
        if self.is_wide:
            return 0, slice(None), _part(warpgroup, self.head_dim // COMPUTE)
        return warpgroup, _part(warpgroup, ROWS), slice(None)

    @property
    def num_items(self) -> int:
        """Tiles of keys of all heads and rows."""
        return self.num_tiles * self.batch * self.kv_heads

    def item_at(self, order: Any, number: Any) -> tuple[Any, ...]:
        """(row, kv head, row of the intervals, tile)."""
        head_bytes = (
            self.num_queries * self.head_dim * (2 + 2 + 4)
        )  # of q, do and dq of the query head in work
        return item_at(order, number, self.batch, self.kv_heads, head_bytes)

    def tiles_of(self, table: Any, head: Any, row: Any, tile: Any) -> tuple[Any, ...]:
        """A query head's (place in `table`, its tiles of queries)."""
        place = lax.rem(head, self.num_patterns) if self.num_patterns else row, tile
        return place, tuple(table[(*place, field)] for field in range(4))


@functools.partial(
    jax.jit, static_argnames=("scale", "softcap", "layout", "interpret")
)  # lowered once for all layers
def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    o: jax.Array,
    lse: jax.Array,
    do: jax.Array,
    dlse: jax.Array,
    low: jax.Array,
    high: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v.

    Args:
        q, k, v, low, high, layout: as given to the forward; H one of 64, 128 and 256.
        o, lse: as the forward gave them.
        do, dlse: their cotangents.
    """
    batch, length, num_heads, head_dim = q.shape
    num_keys, kv_heads = k.shape[1:3]
    problem = Problem(
        length,
        num_keys,
        batch,
        kv_heads,
        num_heads // kv_heads,
        head_dim,
        scale,
        softcap,
        layout.stride if layout else 0,
    )
    margin = -length % QUERIES
    low, high = (jnp.pad(x, ((0, 0), (0, margin))) for x in (low, high))
    delta = jnp.einsum("btnh,btnh->bnt", o, do, preferred_element_type=jnp.float32) - dlse
    lse = jnp.where(
        lse == -jnp.inf, jnp.inf, lse * LOG2E
    )  # so that a query that sees nothing has no probabilities
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, margin)), constant_values=jnp.inf)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, margin)))
    if layout:
        blocks = problem.keys // BLOCK
        visited = query_visits(
            layout, (length + margin) // BLOCK, problem.num_tiles * blocks, blocks
        )
        table, entries = map(jnp.asarray, visited)
    else:
        table = query_tiles(low, high, queries=QUERIES, keys=problem.keys, num_keys=num_keys)
        entries = jnp.zeros((1, 1, 1), jnp.int32)

    def body(*refs):
        refs = _Refs(*refs, *[None] * (len(_FIELDS) - len(refs)))
        queue = make_queue(interpret)
        pl.when(lax.axis_index("warpgroup") == COMPUTE)(lambda: _fetch(refs, problem, queue))
        pl.when(lax.axis_index("warpgroup") < COMPUTE)(
            lambda: _compute(refs, problem, queue, interpret)
        )

    out_type = jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)
    num_blocks = 1 if interpret else NUM_SMS
    kernel = make_kernel(
        body, out_type, _scratch(problem, q.dtype, interpret), num_blocks, interpret
    )
    dq = jax.new_ref(
        jnp.zeros(
            (COMPUTE if interpret else 1, batch, length + margin, num_heads, head_dim), jnp.float32
        )
    )
    order = longest_first(table, problem.num_patterns)
    dk, dv = kernel(order, table, entries, low, high, lse, delta, q, k, v, do, dq)
    return (dq[...].sum(0)[:, :length] * scale).astype(q.dtype), dk, dv


_FIELDS = (
    "order",
    "table",
    "entries",
    "low",
    "high",
    "lse",
    "delta",
    "q",
    "k",
    "v",
    "do",
    "dq",
    "dk",
    "dv",
    "k_smem",
    "v_smem",
    "q_smem",
    "do_smem",
    "ds_smem",
    "dq_smem",
    "bounds_smem",
    "sums_smem",
    "kv_full",
    "kv_empty",
    "q_full",
    "do_full",
    "empty",
    "ds_full",
    "done",
    "ready",
    "p_smem",
)
_Refs = dataclasses.make_dataclass("_Refs", _FIELDS)


def _scratch(problem: Problem, dtype: Any, interpret: Any) -> tuple[Any, ...]:
    keys, head_dim = problem.keys, problem.head_dim
    return (
        plgpu.SMEM((1, keys, head_dim), dtype, transforms=SWIZZLED),
        plgpu.SMEM((1, keys, head_dim), dtype, transforms=SWIZZLED),
        plgpu.SMEM((STAGES, QUERIES, head_dim), dtype, transforms=SWIZZLED),
        plgpu.SMEM((STAGES, QUERIES, head_dim), dtype, transforms=SWIZZLED),
        plgpu.SMEM((2, keys, QUERIES), dtype, transforms=SWIZZLED),
        plgpu.SMEM(
            (COMPUTE, QUERIES, problem.staged_columns), jnp.float32, transforms=SWIZZLED_FLOAT32
        ),
        plgpu.SMEM(
            (2, STAGES, QUERIES), jnp.int32
        ),  # low and high in one, as each takes whole KiBs
        plgpu.SMEM((2, STAGES, QUERIES), jnp.float32),  # lse and delta
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


def _part(number: Any, size: int) -> Any:
    """The `number`-th of equal parts."""
    return pl.ds(pl.multiple_of(number * size, size), size)


def _fetch(refs: Any, problem: Problem, queue: Any) -> None:
    plgpu.set_max_registers(24, action="decrease")

    def one(i, number, count):
        b, kv_head, row, tile = problem.item_at(refs.order, number)
        pl.when(i > 0)(lambda: plgpu.barrier_wait(refs.kv_empty))
        where = b, pl.ds(tile * problem.keys, problem.keys), kv_head
        plgpu.copy_gmem_to_smem(refs.k.at[where], refs.k_smem.at[0], refs.kv_full)
        plgpu.copy_gmem_to_smem(refs.v.at[where], refs.v_smem.at[0], refs.kv_full)

        def step(head, place, j, count):
            slot = lax.rem(count, STAGES)
            query_tile, _ = visit_at(refs.entries, problem.num_patterns, place, j)
            queries = pl.ds(query_tile * QUERIES, QUERIES)
            pl.when(count >= STAGES)(lambda: plgpu.barrier_wait(refs.empty.at[slot]))
            for source, target, barrier in (
                (refs.q.at[b, queries, head], refs.q_smem, refs.q_full),
                (refs.lse.at[b, head, queries], refs.sums_smem.at[0], refs.q_full),
                (refs.low.at[row, queries], refs.bounds_smem.at[0], refs.q_full),
                (refs.high.at[row, queries], refs.bounds_smem.at[1], refs.q_full),
                (refs.do.at[b, queries, head], refs.do_smem, refs.do_full),
                (refs.delta.at[b, head, queries], refs.sums_smem.at[1], refs.do_full),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], barrier.at[slot])
            return count + 1

        def of_head(group, count):
            head = kv_head * problem.groups + group
            place, (first, end, *_) = problem.tiles_of(refs.table, head, row, tile)
            return lax.fori_loop(first, end, functools.partial(step, head, place), count)

        return lax.fori_loop(0, problem.groups, of_head, count)

    num_mine, _, count = over_items(problem.num_items, one, queue, refs.ready, is_fetching=True)
    for slot in range(STAGES):  # a barrier may go only when all that happened to it has been seen
        pl.when(count > slot)(lambda slot=slot: plgpu.barrier_wait(refs.empty.at[slot]))
    pl.when(num_mine > 0)(lambda: plgpu.barrier_wait(refs.kv_empty))


def _compute(refs: Any, problem: Problem, queue: Any, interpret: Any) -> None:
    plgpu.set_max_registers(240, action="increase")
    warpgroup = lax.axis_index("warpgroup")
    _, mine, columns = problem.share(warpgroup)
    accumulator = plgpu.ACC((ROWS, QUERIES), jnp.float32)

    def begin(
        slot, s_ref
    ):  # also where no query sees the keys: nobody uses what is made of an old tile then
        plgpu.wgmma(s_ref, refs.k_smem.at[0, mine], refs.q_smem.at[slot].transpose((1, 0)))
        return s_ref[...]

    def one(i, number, count):
        b, kv_head, row, tile = problem.item_at(refs.order, number)
        plgpu.barrier_wait(refs.kv_full)

        def over_queries(group, carry):
            *sums, count = carry
            head = kv_head * problem.groups + group
            place, tiles = problem.tiles_of(refs.table, head, row, tile)
            first, end, *_ = tiles
            pl.when(end > first)(lambda: plgpu.barrier_wait(refs.q_full.at[lax.rem(count, STAGES)]))
            logits = pl.run_scoped(functools.partial(begin, lax.rem(count, STAGES)), accumulator)
            step = functools.partial(
                _step, refs, problem, interpret, (b, head, place, end), count - first
            )
            *sums, _ = over_runs(tiles, step, (*sums, logits))
            return *sums, count + end - first

        num_columns = problem.head_dim // COMPUTE if problem.is_wide else problem.head_dim
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, num_columns), jnp.float32), MATRIX)
        dk, dv, count = lax.fori_loop(0, problem.groups, over_queries, (zeros, zeros, count))
        plgpu.barrier_arrive(refs.done)  # the other warpgroup reads all keys
        plgpu.barrier_wait(refs.done)
        num_rows = problem.keys // COMPUTE
        rows, own = (
            _part(warpgroup, num_rows),
            pl.ds(tile * problem.keys + warpgroup * num_rows, num_rows),
        )
        for value, smem, gmem in (
            (dk * problem.scale, refs.k_smem, refs.dk),
            (dv, refs.v_smem, refs.dv),
        ):
            smem[0, mine, columns] = value.astype(smem.dtype)
            plgpu.commit_smem()
            if problem.is_wide:  # whole rows are copied, of which the other warpgroup makes a half
                plgpu.barrier_arrive(refs.done)
                plgpu.barrier_wait(refs.done)
            plgpu.copy_smem_to_gmem(smem.at[0, rows], gmem.at[b, own, kv_head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs.kv_empty)
        return count

    over_items(problem.num_items, one, queue, refs.ready, is_fetching=False)
    plgpu.wait_smem_to_gmem(0)


def _step(refs: Any, problem: Problem, interpret: Any, where, passed, is_masked, j, carry):
    """Adds one tile of queries to the gradients of the warpgroup's keys and values; logits lie keys by queries."""
    b, head, place, end = where
    warpgroup = lax.axis_index("warpgroup")
    block, mine, columns = problem.share(warpgroup)
    slot, next_slot = lax.rem(passed + j, STAGES), lax.rem(passed + j + 1, STAGES)
    ds_slot = warpgroup if problem.is_wide else lax.rem(passed + j, 2)
    # An index that ptxas cannot prove constant, or it keeps the descriptors of keys and values in
    # registers and spills.
    nought = lax.optimization_barrier(j) - j
    query_tile, is_seen = visit_at(refs.entries, problem.num_patterns, place, j)
    accumulator = plgpu.ACC((ROWS, QUERIES), jnp.float32)
    buffer = None if refs.p_smem is None else refs.p_smem.at[warpgroup]
    is_by_columns = problem.dq_columns < problem.head_dim
    is_exchanged = (
        is_by_columns and not problem.is_wide
    )  # wide, a warpgroup has the logits of all keys

    def row_of(ref, which):
        return spread(plgpu.load(ref.at[which, slot], layout=COLUMN), (ROWS, QUERIES), 1)

    def probabilities():
        """(probabilities, slope of the soft-cap)."""
        logits, factor, slope, cap = carry[2], problem.scale * LOG2E, None, problem.softcap
        if cap is not None:
            logits, factor = tanh(logits * (problem.scale / cap)), cap * LOG2E
            slope = 1 - logits * logits
        if is_masked:
            key = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 0, layout=MATRIX)
            key += place[1] * problem.keys + block * ROWS
            above = row_of(refs.bounds_smem, 1) * is_seen(block)
            logits = jnp.where(
                (key >= row_of(refs.bounds_smem, 0)) & (key < above), logits, -jnp.inf
            )
        return jnp.exp2(logits * factor - row_of(refs.sums_smem, 0)), slope

    def cotangents(dp_ref):
        plgpu.barrier_wait(refs.do_full.at[slot])
        plgpu.wgmma(dp_ref, refs.v_smem.at[nought, mine], refs.do_smem.at[slot].transpose((1, 0)))
        products = functools.partial(gradients, dp_ref, *probabilities())
        sums, following = accumulate(carry[:2], products, carry[2], interpret=interpret)
        return *sums, following

    def gradients(dp_ref, p, slope, dk_ref, dv_ref):
        multiply(dv_ref, p.astype(refs.do_smem.dtype), refs.do_smem.at[slot, :, columns], buffer)
        ds = p * (plgpu.wgmma_accumulator_load(dp_ref, wait_n=1) - row_of(refs.sums_smem, 1))
        ds = (ds if slope is None else ds * slope).astype(refs.ds_smem.dtype)
        refs.ds_smem[ds_slot, mine] = ds
        plgpu.commit_smem()
        if is_exchanged:
            plgpu.barrier_arrive(refs.ds_full)
        return pl.run_scoped(functools.partial(following, dk_ref), accumulator)

    def following(dk_ref, s_ref):
        """The next tile's logits, made while warpgroups wait for each other; past the last tile nobody uses them."""

        def scores():
            pl.when(j + 1 < end)(lambda: plgpu.barrier_wait(refs.q_full.at[next_slot]))
            plgpu.wgmma(
                s_ref, refs.k_smem.at[nought, mine], refs.q_smem.at[next_slot].transpose((1, 0))
            )

        of_both = functools.partial(of_queries_and_keys, dk_ref)
        if problem.is_early:
            scores()
        pl.run_scoped(of_both, plgpu.ACC((QUERIES, problem.dq_columns), jnp.float32))
        if not problem.is_early:
            scores()
        return s_ref[...]

    def of_queries_and_keys(dk_ref, dq_ref):
        keys = slice(None) if is_by_columns else mine
        share = _part(warpgroup, problem.dq_columns) if is_by_columns else slice(None)
        if is_exchanged:
            plgpu.barrier_wait(refs.ds_full)
        plgpu.wgmma_wait(
            1 if problem.is_early else 0
        )  # for the product of probabilities: frees their registers
        plgpu.wgmma(
            dq_ref,
            refs.ds_smem.at[ds_slot, keys].transpose((1, 0)),
            refs.k_smem.at[nought, keys, share],
        )
        plgpu.wgmma(dk_ref, refs.ds_smem.at[ds_slot, mine], refs.q_smem.at[slot, :, columns])
        dq = plgpu.wgmma_accumulator_load(
            dq_ref, wait_n=1
        )  # stored while the keys' product is made
        target = refs.dq.at[
            warpgroup if interpret else 0, b, pl.ds(query_tile * QUERIES, QUERIES), head, share
        ]
        for first in range(0, problem.dq_columns, problem.staged_columns):
            part = pl.ds(first, problem.staged_columns)
            add(dq[:, first : first + problem.staged_columns], target.at[:, part])

    def add(dq, target):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if interpret:  # which knows no copy that adds; it has one block, and the warpgroups add to sums of their own
            target[...] += dq
        else:
            refs.dq_smem[warpgroup] = dq
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs.dq_smem.at[warpgroup], target, reduction_op="add")

    carry = pl.run_scoped(cotangents, accumulator)
    plgpu.barrier_arrive(refs.empty.at[slot])
    return carry
