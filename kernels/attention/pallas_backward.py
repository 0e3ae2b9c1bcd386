"""The backward of attention for Hopper GPUs, as a Pallas kernel for Mosaic GPU.

A block keeps a tile of keys and values and the sums of their gradients, and goes over the queries
that see them. Each step takes five products. The gradient of the queries is added up in memory, in
the order in which blocks come to it, so its last bits differ from run to run.

The logits of the next tile of queries are computed before a step's last products, so that the
tensor cores have work during its softmax. A warpgroup sums up dk and dv for half of the tile's
keys. For heads wider than 128 that does not fit in its registers: there it sums up half of the
columns for all keys, and both warpgroups compute the logits, which makes seven products.

Source: Dao 2023 (arXiv 2307.08691), algorithm 2; Shah et al. 2024 (arXiv 2407.08608), appendix B.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.backward_problem import (
    QUERIES,
    STAGES,
    Problem,
    Refs,
    scratch_types,
)
from jaxscale.kernels.attention.products import (
    COLUMN,
    MATRIX,
    accumulate,
    multiply,
    over_runs,
    spread,
    tanh,
    visit_at,
)
from jaxscale.kernels.attention.scheduler import longest_first, make_queue, over_items
from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout, query_tiles, query_visits
from jaxscale.kernels.persistent import (
    COMPUTE,
    LOG2E,
    NUM_SMS,
    ROWS,
    drain,
    make_kernel,
    part,
    wait_if,
    zeros_after,
)


# jit: the kernel is lowered once for all layers.
@functools.partial(jax.jit, static_argnames=("scale", "softcap", "dq_dtype", "layout", "interpret"))
def backward(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None,
    dq_dtype: Any,
    layout: BlockLayout | None = None,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """Gradients of q, in `dq_dtype`, and of k and v.

    Args:
        q, k, v, low, high, scale, softcap, layout, interpret: as given to the forward.
        do, lse, delta: as `api.gradients`.
    """
    batch, length, num_heads, head_dim = q.shape
    num_keys, kv_heads = k.shape[1:3]
    problem = Problem(
        num_queries=length,
        num_keys=num_keys,
        batch=batch,
        kv_heads=kv_heads,
        groups=num_heads // kv_heads,
        head_dim=head_dim,
        scale=scale,
        softcap=softcap,
        num_patterns=layout.stride if layout else 0,
    )
    margin = -length % QUERIES
    padded = length + margin
    by_row = (0, 0), (0, margin)
    by_head = (0, 0), *by_row
    low, high = (jnp.pad(x, by_row) for x in (low, high))
    # With an lse of +inf the probabilities of a query that sees nothing are 0, not NaN.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    lse = jnp.pad(lse, by_head, constant_values=jnp.inf)
    delta = jnp.pad(delta, by_head)
    if layout:
        blocks = problem.keys // BLOCK
        visited = query_visits(layout, padded // BLOCK, problem.num_tiles * blocks, blocks)
        table, entries = map(jnp.asarray, visited)
    else:
        table = query_tiles(low, high, queries=QUERIES, keys=problem.keys, num_keys=num_keys)
        entries = jnp.zeros((1, 1, 1), jnp.int32)

    def body(*refs):
        refs = Refs(*refs)
        queue = make_queue(interpret)

        @pl.when(lax.axis_index("warpgroup") == COMPUTE)
        def _():
            _fetch(refs, problem, queue)

        @pl.when(lax.axis_index("warpgroup") < COMPUTE)
        def _():
            _compute(refs, problem, queue, interpret)

    types = tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (k, v))
    scratch = scratch_types(problem, q.dtype, interpret)
    kernel = make_kernel(body, types, scratch, 1 if interpret else NUM_SMS, interpret)
    # Interpretation cannot add in memory: there each warpgroup has a sum of its own.
    num_sums = COMPUTE if interpret else 1
    q, nothing = zeros_after(q, (num_sums, batch, padded, num_heads, head_dim))
    dq_ref = jax.new_ref(nothing)
    work = longest_first(table, problem.num_patterns), table, entries, low, high
    dk, dv = kernel(*work, lse, delta, q, k, v, do, dq_ref)
    return (dq_ref[...].sum(0)[:, :length] * scale).astype(dq_dtype), dk, dv


def _fetch(refs: Refs, problem: Problem, queue: Any) -> None:
    """What the fetching warpgroup does: copies keys, values and what belongs to the queries."""
    # The other warpgroups take the registers that this one gives back.
    plgpu.set_max_registers(24, action="decrease")

    def fetch_item(i, number, count):
        b, kv_head, row, tile = problem.item_at(refs.order, number)
        wait_if(i > 0, refs.kv_empty)
        keys = pl.ds(tile * problem.keys, problem.keys)
        for source, target in ((refs.k, refs.k_smem), (refs.v, refs.v_smem)):
            of_tile = source.at[b, keys, kv_head]
            plgpu.copy_gmem_to_smem(of_tile, target.at[0], refs.kv_full)

        def fetch_tile(head, place, j, count):
            slot = lax.rem(count, STAGES)
            query_tile, _ = visit_at(refs.entries, problem.num_patterns, place, j)
            queries = pl.ds(query_tile * QUERIES, QUERIES)
            wait_if(count >= STAGES, refs.empty, slot)
            # What the probabilities need has a barrier of its own, so that they wait for no more.
            for_probabilities = (
                (refs.q.at[b, queries, head], refs.q_smem),
                (refs.lse.at[b, head, queries], refs.sums_smem.at[0]),
                (refs.low.at[row, queries], refs.bounds_smem.at[0]),
                (refs.high.at[row, queries], refs.bounds_smem.at[1]),
            )
            for source, target in for_probabilities:
                plgpu.copy_gmem_to_smem(source, target.at[slot], refs.q_full.at[slot])
            for_gradients = (
                (refs.do.at[b, queries, head], refs.do_smem),
                (refs.delta.at[b, head, queries], refs.sums_smem.at[1]),
            )
            for source, target in for_gradients:
                plgpu.copy_gmem_to_smem(source, target.at[slot], refs.do_full.at[slot])
            return count + 1

        def fetch_head(group, count):
            head = kv_head * problem.groups + group
            place, tiles = problem.tiles_of(refs.table, head, row, tile)
            first, end, _, _ = tiles
            fetch = functools.partial(fetch_tile, head, place)
            return lax.fori_loop(first, end, fetch, count)

        return lax.fori_loop(0, problem.groups, fetch_head, count)

    items = over_items(problem.num_items, fetch_item, queue, refs.ready, is_fetching=True)
    num_mine, _, count = items
    drain((refs.empty,), count, STAGES)
    wait_if(num_mine > 0, refs.kv_empty)


def _compute(
    refs: Refs,
    problem: Problem,
    queue: Any,
    interpret: Any,
) -> None:
    """What each of the other warpgroups does: its share of the gradients of each item's keys."""
    plgpu.set_max_registers(240, action="increase")
    warpgroup = lax.axis_index("warpgroup")
    _, mine, columns = problem.share(warpgroup)
    accumulator = plgpu.ACC((ROWS, QUERIES), jnp.float32)

    def first_logits(slot, logits_ref):
        # Computed even where no query sees the keys: nobody uses what comes of an old tile then.
        q_turned = refs.q_smem.at[slot].transpose((1, 0))
        plgpu.wgmma(logits_ref, refs.k_smem.at[0, mine], q_turned)
        return logits_ref[...]

    def compute_item(i, number, count):
        b, kv_head, row, tile = problem.item_at(refs.order, number)
        plgpu.barrier_wait(refs.kv_full)

        def over_queries(group, carry):
            dk, dv, count = carry
            head = kv_head * problem.groups + group
            place, tiles = problem.tiles_of(refs.table, head, row, tile)
            first, end, _, _ = tiles

            @pl.when(end > first)
            def _():
                slot = lax.rem(count, STAGES)
                plgpu.barrier_wait(refs.q_full.at[slot])

            slot = lax.rem(count, STAGES)
            begin = functools.partial(first_logits, slot)
            logits = pl.run_scoped(begin, accumulator)
            where = b, head, place, end
            step = functools.partial(_step, refs, problem, interpret, where, count - first)
            dk, dv, _ = over_runs(tiles, step, (dk, dv, logits))
            return dk, dv, count + end - first

        zeros = jnp.zeros((ROWS, problem.columns), jnp.float32)
        zeros = plgpu.layout_cast(zeros, MATRIX)
        carry = zeros, zeros, count
        dk, dv, count = lax.fori_loop(0, problem.groups, over_queries, carry)
        # The gradients take the place of the keys and values, which the other warpgroup may still
        # read.
        plgpu.barrier_arrive(refs.done)
        plgpu.barrier_wait(refs.done)
        num_rows = problem.keys // COMPUTE
        rows = part(warpgroup, num_rows)
        keys = pl.ds(tile * problem.keys + warpgroup * num_rows, num_rows)
        results = (
            (dk * problem.scale, refs.k_smem, refs.dk),
            (dv, refs.v_smem, refs.dv),
        )
        for value, smem, gmem in results:
            smem[0, mine, columns] = value.astype(smem.dtype)
            plgpu.commit_smem()
            if problem.is_wide:
                # Whole rows are copied, of which the other warpgroup computes half.
                plgpu.barrier_arrive(refs.done)
                plgpu.barrier_wait(refs.done)
            target = gmem.at[b, keys, kv_head]
            plgpu.copy_smem_to_gmem(smem.at[0, rows], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs.kv_empty)
        return count

    over_items(problem.num_items, compute_item, queue, refs.ready, is_fetching=False)
    plgpu.wait_smem_to_gmem(0)


def _step(
    refs: Refs,
    problem: Problem,
    interpret: Any,
    where,
    passed,
    is_masked,
    j,
    carry,
):
    """Adds one tile of queries to the gradients of the warpgroup's keys and values.

    Logits lie keys by queries. An accumulator exists in the scope of a function that takes it, so
    the step is a chain of functions, each of which has one accumulator more than its caller and
    begins one product more:
        with_dp -> with_dk_and_dv -> with_next_logits -> with_dq.

    Args:
        where: (row, query head, place in the table, end of the visits).
        passed: number of steps before the visit 0, so that passed + j counts all steps.
        is_masked: whether some query may not see some key.
        j: number of the visit.
        carry: (dk, dv, logits of this tile); the step returns the logits of the next.
    """
    b, head, place, end = where
    dk, dv, logits = carry
    warpgroup = lax.axis_index("warpgroup")
    block, mine, columns = problem.share(warpgroup)
    slot = lax.rem(passed + j, STAGES)
    next_slot = lax.rem(passed + j + 1, STAGES)
    ds_slot = warpgroup if problem.is_wide else lax.rem(passed + j, 2)
    # An index of 0 that ptxas cannot prove constant. With a constant one it keeps the descriptors
    # of keys and values in registers, and spills.
    zero = lax.optimization_barrier(j) - j
    query_tile, is_seen = visit_at(refs.entries, problem.num_patterns, place, j)
    accumulator = plgpu.ACC((ROWS, QUERIES), jnp.float32)
    p_mine = None if refs.p_smem is None else refs.p_smem.at[warpgroup]
    is_by_columns = problem.dq_columns < problem.head_dim
    # Of wide heads each warpgroup has the logits of all keys and needs none of the other's.
    is_exchanged = is_by_columns and not problem.is_wide

    def by_query(ref, which):
        values = plgpu.load(ref.at[which, slot], layout=COLUMN)
        return spread(values, (ROWS, QUERIES), 1)

    def probabilities():
        """(probabilities, slope of the soft-cap or None)."""
        exponents, factor, slope = logits, problem.scale * LOG2E, None
        if problem.softcap is not None:
            capped = tanh(logits * (problem.scale / problem.softcap))
            exponents, factor = capped, problem.softcap * LOG2E
            slope = 1 - capped * capped
        if is_masked:
            exponents = jnp.where(is_visible(), exponents, -jnp.inf)
        p = jnp.exp2(exponents * factor - by_query(refs.sums_smem, 0))
        return p, slope

    def is_visible():
        key = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 0, layout=MATRIX)
        key += place[1] * problem.keys + block * ROWS
        # Where the layout hides this block from the queries, no key is below 0.
        high = by_query(refs.bounds_smem, 1) * is_seen(block)
        low = by_query(refs.bounds_smem, 0)
        return (key >= low) & (key < high)

    def with_dp(dp_ref):
        """Starts dp = v do^T and computes the probabilities beside it."""
        plgpu.barrier_wait(refs.do_full.at[slot])
        do_turned = refs.do_smem.at[slot].transpose((1, 0))
        plgpu.wgmma(dp_ref, refs.v_smem.at[zero, mine], do_turned)
        products = functools.partial(with_dk_and_dv, dp_ref, *probabilities())
        sums, next_logits = accumulate((dk, dv), products, logits, interpret=interpret)
        return *sums, next_logits

    def with_dk_and_dv(dp_ref, p, slope, dk_ref, dv_ref):
        """Starts dv += p do and stores ds, the gradient of the logits."""
        do = refs.do_smem.at[slot, :, columns]
        multiply(dv_ref, p.astype(refs.do_smem.dtype), do, p_mine)
        # dp is there when one product, that of dv, is left.
        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)
        ds = p * (dp - by_query(refs.sums_smem, 1))
        ds = ds if slope is None else ds * slope
        refs.ds_smem[ds_slot, mine] = ds.astype(refs.ds_smem.dtype)
        plgpu.commit_smem()
        if is_exchanged:
            plgpu.barrier_arrive(refs.ds_full)
        return pl.run_scoped(functools.partial(with_next_logits, dk_ref), accumulator)

    def with_next_logits(dk_ref, logits_ref):
        """The next tile's logits, computed while warpgroups wait for each other.

        Past the last tile nobody uses them.
        """

        def start_logits():
            wait_if(j + 1 < end, refs.q_full, next_slot)
            q_turned = refs.q_smem.at[next_slot].transpose((1, 0))
            plgpu.wgmma(logits_ref, refs.k_smem.at[zero, mine], q_turned)

        dq_type = plgpu.ACC((QUERIES, problem.dq_columns), jnp.float32)
        if problem.is_early:
            start_logits()
        pl.run_scoped(functools.partial(with_dq, dk_ref), dq_type)
        if not problem.is_early:
            start_logits()
        return logits_ref[...]

    def with_dq(dk_ref, dq_ref):
        """dq = ds^T k and dk += ds q."""
        keys = slice(None) if is_by_columns else mine
        dq_columns = part(warpgroup, problem.dq_columns) if is_by_columns else slice(None)
        if is_exchanged:
            plgpu.barrier_wait(refs.ds_full)
        # The product of the probabilities must have ended, which frees their registers; the next
        # logits, if already begun, run on.
        plgpu.wgmma_wait(1 if problem.is_early else 0)
        ds_turned = refs.ds_smem.at[ds_slot, keys].transpose((1, 0))
        plgpu.wgmma(dq_ref, ds_turned, refs.k_smem.at[zero, keys, dq_columns])
        ds = refs.ds_smem.at[ds_slot, mine]
        plgpu.wgmma(dk_ref, ds, refs.q_smem.at[slot, :, columns])
        # One product may run on: dq is stored while that of the keys is computed.
        dq = plgpu.wgmma_accumulator_load(dq_ref, wait_n=1)
        number = warpgroup if interpret else 0
        queries = pl.ds(query_tile * QUERIES, QUERIES)
        target = refs.dq.at[number, b, queries, head, dq_columns]
        for first in range(0, problem.dq_columns, problem.staged_columns):
            staged = dq[:, first : first + problem.staged_columns]
            columns_of_part = pl.ds(first, problem.staged_columns)
            add(staged, target.at[:, columns_of_part])

    def add(dq, target):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if interpret:
            # Which knows no copy that adds. It has one block, and each warpgroup a sum of its own.
            target[...] += dq
        else:
            refs.dq_smem[warpgroup] = dq
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(refs.dq_smem.at[warpgroup], target, reduction_op="add")

    carry = pl.run_scoped(with_dp, accumulator)
    plgpu.barrier_arrive(refs.empty.at[slot])
    return carry
