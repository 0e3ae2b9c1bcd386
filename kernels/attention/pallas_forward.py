"""The forward of attention for Hopper GPUs, as a Pallas kernel for Mosaic GPU.

Two warpgroups multiply, each for 64 queries, and one fetches. A warpgroup gives the tensor cores
two products at once: the logits of the next tile of keys, and the probabilities of this tile times
its values. It computes the softmax of the former while the latter runs. The two warpgroups take
turns, so that the softmax of one also runs beside the products of the other.

Source: Dao 2023 (arXiv 2307.08691), algorithm 1; Shah et al. 2024 (arXiv 2407.08608), section 3.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.forward_problem import (
    QUERIES,
    STAGES,
    Problem,
    Refs,
    scratch_types,
)
from jaxscale.kernels.attention.products import (
    MATRIX,
    ROW,
    accumulate,
    minus_infinity,
    multiply,
    spread,
    tanh,
    visit_at,
)
from jaxscale.kernels.attention.scheduler import longest_first, make_queue, over_items
from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout, key_tiles, key_visits
from jaxscale.kernels.persistent import (
    COMPUTE,
    LOG2E,
    NUM_SMS,
    ROWS,
    drain,
    make_kernel,
    part,
    wait_if,
)


# jit: the kernel is lowered once for all layers.
@functools.partial(
    jax.jit, static_argnames=("scale", "softcap", "layout", "is_invariant", "interpret")
)
def forward(
    q: Array,
    k: Array,
    v: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
    is_invariant: bool = False,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Attention of every query t over the keys low[t] <= s < high[t].

    Args:
        q: [B, T, N, H], H one of 64, 96, 128 and 256.
        k, v: [B, S, K, H].
        low, high: [B or 1, T] int32; with a layout they must be those of a causal mask.
        scale, softcap, layout, is_invariant, interpret: as for `api.attention`.
    Returns:
        (o [B, T, N, H], lse [B, N, T] float32); 0 and -inf where a query sees nothing.
    """
    batch, length, num_heads, head_dim = q.shape
    num_keys, kv_heads = k.shape[1:3]
    padded = pl.cdiv(length, QUERIES) * QUERIES
    margin = ((0, 0), (0, padded - length))
    low, high = (jnp.pad(x, margin) for x in (low, high))
    # Of wide heads shared memory holds half as many keys, and one tile of queries.
    is_wide = head_dim > 128
    groups = num_heads // kv_heads
    problem = Problem(
        num_tiles=padded // QUERIES,
        batch=batch,
        num_heads=num_heads,
        groups=groups,
        head_dim=head_dim,
        head_bytes=2 * 2 * num_keys * head_dim // groups,
        keys=BLOCK if is_wide or layout or is_invariant else 128,
        query_slots=1 if is_wide else 2,
        scale=scale,
        softcap=softcap,
        num_patterns=layout.stride if layout else 0,
    )
    if layout:
        visited = key_visits(layout, padded // BLOCK, pl.cdiv(num_keys, BLOCK), 2)
        table, entries = map(jnp.asarray, visited)
    else:
        table = key_tiles(low, high, queries=QUERIES, keys=problem.keys)
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

    o_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
    lse_type = jax.ShapeDtypeStruct((batch, num_heads, padded), jnp.float32)
    scratch = scratch_types(problem, q.dtype, interpret)
    num_blocks = 2 if interpret else NUM_SMS
    kernel = make_kernel(body, (o_type, lse_type), scratch, num_blocks, interpret)
    order = longest_first(table, problem.num_patterns)
    o, lse = kernel(order, table, entries, low, high, q, k, v)
    return o, lse[:, :, :length]


def _fetch(refs: Refs, problem: Problem, queue: Any) -> None:
    """What the fetching warpgroup does: copies queries, keys and values of the block's items."""
    # The other warpgroups take the registers that this one gives back.
    plgpu.set_max_registers(24, action="decrease")
    keys, slots = problem.keys, problem.query_slots

    def fetch_item(i, number, count):
        b, head, row, place, tiles = problem.item_at(refs.order, refs.table, number)
        first, end, _, _ = tiles
        slot = lax.rem(i, slots)
        wait_if(i >= slots, refs.q_empty, slot)
        queries = pl.ds(place[1] * QUERIES, QUERIES)
        copies = (
            (refs.q.at[b, queries, head], refs.q_smem),
            (refs.low.at[row, queries], refs.low_smem),
            (refs.high.at[row, queries], refs.high_smem),
        )
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target.at[slot], refs.q_full.at[slot])

        def fetch_tile(j, count):
            slot = lax.rem(count, STAGES)
            # The last tile comes first, as `_attend` wants it.
            tile, _ = visit_at(refs.entries, problem.num_patterns, place, end - 1 - j)
            where = b, pl.ds(tile * keys, keys), lax.div(head, problem.groups)
            copies = (
                (refs.k, refs.k_smem, refs.k_full, refs.k_empty),
                (refs.v, refs.v_smem, refs.v_full, refs.v_empty),
            )
            for source, target, full, empty in copies:
                wait_if(count >= STAGES, empty, slot)
                plgpu.copy_gmem_to_smem(source.at[where], target.at[slot], full.at[slot])
            return count + 1

        return lax.fori_loop(0, end - first, fetch_tile, count)

    items = over_items(problem.num_items, fetch_item, queue, refs.ready, is_fetching=True)
    num_mine, _, count = items
    drain((refs.k_empty, refs.v_empty), count, STAGES)
    drain((refs.q_empty,), num_mine, slots)


def _compute(
    refs: Refs,
    problem: Problem,
    queue: Any,
    interpret: Any,
) -> None:
    """What each of the other warpgroups does: attention of its half of each item's queries."""
    plgpu.set_max_registers(240, action="increase")
    warpgroup = lax.axis_index("warpgroup")
    # The first turn is warpgroup 0's.
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(refs.turn.at[0]))

    def compute_item(i, number, count):
        b, head, _, place, tiles = problem.item_at(refs.order, refs.table, number)
        first, end, _, _ = tiles
        slot = lax.rem(i, problem.query_slots)
        mine = part(warpgroup, ROWS)
        q_mine = refs.q_smem.at[slot, mine]
        plgpu.barrier_wait(refs.q_full.at[slot])

        def store(o, lse):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            # The output takes the place of the queries, which nobody reads any more.
            q_mine[...] = o.astype(q_mine.dtype)
            refs.lse_smem[mine] = lse
            plgpu.commit_smem()
            queries = pl.ds(place[1] * QUERIES + warpgroup * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(q_mine, refs.o.at[b, queries, head])
            plgpu.copy_smem_to_gmem(refs.lse_smem.at[mine], refs.lse.at[b, head, queries])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(refs.q_empty.at[slot])

        zeros = jnp.zeros(q_mine.shape, jnp.float32)
        zeros = plgpu.layout_cast(zeros, MATRIX)

        @pl.when(end > first)
        def _():
            softmax = functools.partial(_softmax, refs, problem, place, slot)
            result = _attend(refs, problem, q_mine, tiles, count, zeros, softmax, interpret)
            store(*result)

        @pl.when(end == first)
        def _():
            store(zeros, minus_infinity(ROWS))

        return count + end - first

    over_items(problem.num_items, compute_item, queue, refs.ready, is_fetching=False)
    # The last turn that warpgroup 1 gave away must have been waited for when the kernel ends.
    wait_if(warpgroup == 0, refs.turn, 0)
    plgpu.wait_smem_to_gmem(0)


def _softmax(
    refs: Refs,
    problem: Problem,
    place,
    slot,
    logits,
    top,
    number,
    is_masked,
):
    """One step of the online softmax, in powers of two.

    Args:
        place, slot: of the tile of queries: (row of the table, tile), and where it lies in shared
            memory.
        logits: of one tile of keys, before scale and soft-cap.
        top: the largest logit of each query so far.
        number: of the visit that these logits are of.
        is_masked: whether some query may not see some key.
    Returns:
        (exponentials, their sums, factors by which the old sums shrink, the new maxima).
    """
    factor, cap = problem.scale * LOG2E, problem.softcap
    if cap is not None:
        logits = tanh(logits * (problem.scale / cap))
        factor = cap * LOG2E
    if is_masked:
        sees = _mask(refs, problem, place, slot, logits.shape, number)
        logits = jnp.where(sees, logits, -jnp.inf)
    new = jnp.maximum(top, logits.max(axis=1) * factor)
    # A query that has seen nothing yet has the maximum -inf, and -inf - -inf would be NaN.
    safe = jnp.where(new == -jnp.inf, 0.0, new) if is_masked else new
    p = jnp.exp2(logits * factor - spread(safe, logits.shape, 0))
    return p, p.sum(axis=1), jnp.exp2(top - safe), new


def _mask(
    refs: Refs,
    problem: Problem,
    place,
    slot,
    shape,
    number,
):
    """Which keys of the `number`-th visited tile each query of this warpgroup sees."""
    warpgroup = lax.axis_index("warpgroup")
    tile, is_seen = visit_at(refs.entries, problem.num_patterns, place, number)
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    key = key + tile * problem.keys
    mine = part(warpgroup, ROWS)
    low = plgpu.load(refs.low_smem.at[slot, mine], layout=ROW)
    high = plgpu.load(refs.high_smem.at[slot, mine], layout=ROW)
    # Where the layout hides the tile from this warpgroup's block, no key is below 0.
    high = high * is_seen(warpgroup)
    low, high = spread(low, shape, 0), spread(high, shape, 0)
    return (key >= low) & (key < high)


def _attend(
    refs: Refs,
    problem: Problem,
    q_mine,
    tiles,
    count,
    zeros,
    softmax,
    interpret,
):
    """(output, log of the sum of exponentials) of this warpgroup's queries.

    The last tile of keys comes first: under a causal mask it needs a mask, which every first step
    applies.
    """
    first, end, whole_first, whole_end = tiles
    warpgroup = lax.axis_index("warpgroup")
    logits_type = plgpu.ACC((ROWS, problem.keys), jnp.float32)
    p_mine = None if refs.p_smem is None else refs.p_smem.at[warpgroup]

    def start_logits(logits_ref, slot):
        plgpu.barrier_wait(refs.k_full.at[slot])
        plgpu.barrier_wait(refs.turn.at[warpgroup])
        plgpu.wgmma(logits_ref, q_mine, refs.k_smem.at[slot].transpose((1, 0)))

    def pass_turn():
        plgpu.barrier_arrive(refs.turn.at[1 - warpgroup])

    def begin(logits_ref):
        slot = lax.rem(count, STAGES)
        start_logits(logits_ref, slot)
        pass_turn()
        logits = logits_ref[...]
        plgpu.barrier_arrive(refs.k_empty.at[slot])
        return softmax(logits, minus_infinity(ROWS), end - 1, True)

    def step(is_masked, j, carry):
        """Adds the tile before this one, and computes this one's probabilities meanwhile."""
        o, p, total, top = carry
        now, before = lax.rem(count + j, STAGES), lax.rem(count + j - 1, STAGES)

        def products(o_ref):
            def scores(logits_ref):
                start_logits(logits_ref, now)
                plgpu.barrier_wait(refs.v_full.at[before])
                multiply(o_ref, p, refs.v_smem.at[before], p_mine)
                pass_turn()
                # The logits are there when one product, that of the values, is left.
                logits = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
                plgpu.barrier_arrive(refs.k_empty.at[now])
                return softmax(logits, top, end - 1 - j, is_masked)

            return pl.run_scoped(scores, logits_type)

        like = p.astype(jnp.float32), total, top, top
        (o,), results = accumulate((o,), products, like, interpret=interpret)
        p_wide, total_new, shrink, top = results
        # The product reads the old probabilities from registers until it is done. The barrier
        # keeps the compiler from converting the new ones into these registers before.
        p = lax.optimization_barrier(p_wide).astype(p.dtype)
        plgpu.barrier_arrive(refs.v_empty.at[before])
        return o * spread(shrink, o.shape, 0), p, total * shrink + total_new, top

    def finish(o, p):
        """Adds the last tile."""
        before = lax.rem(count + end - first - 1, STAGES)

        def product(o_ref):
            plgpu.barrier_wait(refs.v_full.at[before])
            plgpu.barrier_wait(refs.turn.at[warpgroup])
            multiply(o_ref, p, refs.v_smem.at[before], p_mine)
            pass_turn()
            return ()

        (o,), _ = accumulate((o,), product, (), interpret=interpret)
        plgpu.barrier_arrive(refs.v_empty.at[before])
        return o

    p, total, _, top = pl.run_scoped(begin, logits_type)
    carry = zeros, p.astype(q_mine.dtype), total, top
    # Backwards: masked tiles behind those that are seen whole, these, and masked ones before them.
    runs = (
        (1, end - whole_end, True),
        (jnp.maximum(end - whole_end, 1), end - whole_first, False),
        (jnp.maximum(end - whole_first, 1), end - first, True),
    )
    for lower, upper, is_masked in runs:
        carry = lax.fori_loop(lower, upper, functools.partial(step, is_masked), carry)
    o, p, total, top = carry
    o = finish(o, p)
    # A query that sees nothing gets an output of 0, not 0 / 0; its lse is -inf.
    total = jnp.where(total == 0.0, 1.0, total)
    o = o * spread(1 / total, o.shape, 0)
    return o, top * (1 / LOG2E) + jnp.log(total)
