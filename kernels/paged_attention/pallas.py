"""Attention over pages for Hopper GPUs, as a Pallas kernel for Mosaic GPU.

A block is one warpgroup that reads a stream of pages of one sequence and kv head. It fetches some
pages ahead by itself, so that no warpgroup has to be told when a page's place is free. The tensor
cores multiply 64 rows, of which a kv head's queries fill a few: reading the pages takes longer
than that. Keys and values of 8 bits are converted to float16 on their way, in which they are exact,
and so are the queries; scales multiply the logits and the weights. Where there are fewer sequences
and heads than the GPU has room for, the pages of each are dealt out to several streams, whose
results are added up by their normalisers.

Source: Dao 2023 (arXiv 2307.08691), algorithm 1; Dao et al. 2023, Flash-Decoding.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.products import (
    COLUMN,
    MATRIX,
    ROW,
    accumulate,
    minus_infinity,
    multiply,
    spread,
    tanh,
)
from jaxscale.kernels.persistent import LOG2E, NUM_SMS, ROWS, SWIZZLED, swizzled

MAX_GROUPS = ROWS
# Weights times scales of values are multiplied in float16, which has few digits below 2^-14.
SHIFT = 2.0**8
# 8 bits: how they lie in shared memory, and in registers while they are converted.
NARROW = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
NARROW_LAYOUT = plgpu.Layout.WGMMA_UPCAST_4X
UNIT = 8  # rows of a swizzled tile
PAGES_BYTES = 64 * 1024  # of pages in shared memory, so that two blocks fit a multiprocessor
BLOCKS_PER_SM = 2


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and settings that a kernel is compiled for.

    Args:
        groups: query heads that read one kv head; they divide UNIT, or UNIT divides them.
        page_size: keys in a page.
        head_dim: H.
        num_streams: blocks among which the pages of a sequence and kv head are dealt out.
        scale: factor on the logits.
        softcap: c in c * tanh(logits / c); None for none.
        stages: pages of keys, and of values, in shared memory.
        is_narrow: whether pages have 8 bits a value.
    """

    groups: int
    page_size: int
    head_dim: int
    num_streams: int
    scale: float
    softcap: float | None
    stages: int
    is_narrow: bool

    @property
    def window(self) -> int:
        """Rows of queries that a block reads: whole tiles, which may hold other heads' too."""
        return max(self.groups, UNIT)


# jit: the kernel is lowered once for all layers.
@functools.partial(jax.jit, static_argnames=("scale", "softcap", "is_invariant", "interpret"))
def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    low: Array,
    high: Array,
    scales: tuple[Array, Array] | None = None,
    *,
    scale: float,
    softcap: float | None,
    is_invariant: bool = False,
    interpret: Any = False,
) -> Array:
    """As `api.paged_attention`."""
    num, num_heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    own_groups = num_heads // kv_heads
    groups = own_groups
    room = BLOCKS_PER_SM * NUM_SMS
    num_streams = max(min(room // (num * kv_heads), block_table.shape[1]), 1)
    num_streams = 1 if is_invariant else num_streams
    # Several streams write their normalisers, at least UNIT of them at a time.
    is_padded = num_streams > 1 or num_heads % UNIT or (UNIT % groups and groups % UNIT)
    if is_padded:
        groups = pl.cdiv(groups, UNIT) * UNIT
    is_narrow = scales is not None
    num_elements = 2 * page_size * head_dim  # of a page of keys and one of values
    room_bytes = PAGES_BYTES - (2 * num_elements if is_narrow else 0)
    problem = Problem(
        groups=groups,
        page_size=page_size,
        head_dim=head_dim,
        num_streams=num_streams,
        scale=scale,
        softcap=softcap,
        stages=max(room_bytes // (k_pages.dtype.itemsize * num_elements), 2),
        is_narrow=is_narrow,
    )
    wide = jnp.float16 if is_narrow else q.dtype
    grouped = q.astype(wide).reshape(num, kv_heads, own_groups, head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, groups - own_groups), (0, 0)))
    grouped = grouped.reshape(num, -1, head_dim)

    operands = (block_table, low, high, grouped, k_pages, v_pages, *(scales or ()))

    def body(*refs):
        of_scales = () if is_narrow else (None, None)
        _run(_Refs(*refs[:6], *of_scales, *refs[6:]), problem, interpret)

    shape = (num, kv_heads, problem.num_streams)
    o_type = jax.ShapeDtypeStruct((*shape, groups, head_dim), q.dtype)
    lse_type = jax.ShapeDtypeStruct((*shape, problem.window), jnp.float32)
    kernel = plgpu.kernel(
        body,
        out_type=(o_type, lse_type),
        scratch_types=_scratch_types(problem, k_pages.dtype, wide, q.dtype, interpret),
        grid=shape,
        grid_names=("sequence", "head", "stream"),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=True,
        ),
        interpret=interpret,
    )
    o, lse = kernel(*operands)
    o = _joined(o, lse)[:, :, :own_groups]
    return o.reshape(q.shape).astype(q.dtype)


def _joined(o: Array, lse: Array) -> Array:
    """Results of streams o [D, K, streams, G, H] and their lse [D, K, streams, G] added up.

    Written out stream by stream, which XLA makes one kernel of; of reductions it makes four.
    """
    num_streams = o.shape[2]
    if num_streams == 1:
        return o[:, :, 0]
    parts = [o[:, :, stream] for stream in range(num_streams)]
    sizes = [lse[:, :, stream, :, None] for stream in range(num_streams)]
    top = functools.reduce(jnp.maximum, sizes)
    # A query that sees nothing has -inf throughout, and -inf - -inf would be NaN.
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = [jnp.exp(size - top) for size in sizes]
    total = sum(weights)
    summed = sum(part * weight for part, weight in zip(parts, weights, strict=True))
    return summed / jnp.where(total == 0, 1, total)


class _Refs(NamedTuple):
    """A kernel's references: to its operands and results in global memory, then to its scratch."""

    block_table: Any
    low: Any
    high: Any
    q: Any
    k_pages: Any
    v_pages: Any
    k_scales: Any
    v_scales: Any
    o: Any
    lse: Any
    # Shared memory.
    q_smem: Any
    k_smem: Any
    v_smem: Any
    o_smem: Any
    lse_smem: Any
    # Barriers: a copy has come.
    q_full: Any
    k_full: Any
    v_full: Any
    # Shared memory for pages of 8 bits: their scales, and a page in float16.
    k_scales_smem: Any
    v_scales_smem: Any
    k_wide: Any
    v_wide: Any
    # What interpretation needs.
    p_smem: Any


def _scratch_types(
    problem: Problem,
    pages_type: Any,
    wide: Any,
    o_type: Any,
    interpret: Any,
) -> tuple[Any, ...]:
    """Shared memory and barriers in the order of `_Refs`."""
    page = (problem.page_size, problem.head_dim)
    transforms = NARROW if problem.is_narrow else SWIZZLED
    pages = plgpu.SMEM((problem.stages, *page), pages_type, transforms=transforms)
    num_copies = 2 if problem.is_narrow else 1
    full = plgpu.Barrier(num_arrivals=num_copies, num_barriers=problem.stages)
    converted, scales = None, None
    if problem.is_narrow:
        converted = swizzled(page, wide)
        scales = plgpu.SMEM((problem.stages, problem.page_size), jnp.bfloat16)
    return (
        swizzled((ROWS, problem.head_dim), wide),
        pages,
        pages,
        plgpu.SMEM((ROWS, problem.head_dim), o_type),
        plgpu.SMEM((ROWS,), jnp.float32),
        plgpu.Barrier(),
        full,
        full,
        scales,
        scales,
        converted,
        converted,
        plgpu.SMEM((ROWS, problem.page_size), wide) if interpret else None,
    )


def _run(refs: _Refs, problem: Problem, interpret: Any) -> None:
    """One stream of one sequence and kv head."""
    sequence, head, stream = map(lax.axis_index, ("sequence", "head", "stream"))
    low, high = refs.low[sequence], refs.high[sequence]
    first = lax.div(low, problem.page_size) + stream
    end = lax.div(high + problem.page_size - 1, problem.page_size)
    count = lax.div(end - first + problem.num_streams - 1, problem.num_streams)
    count = jnp.where(high > low, jnp.maximum(count, 0), 0)

    def number_at(i):
        # The last page comes first, as in the kernel for prompts, whose sums are to be the same.
        return first + (count - 1 - i) * problem.num_streams

    def page_at(i):
        return refs.block_table[sequence, number_at(jnp.minimum(i, count - 1))]

    def fetch(i, page):
        slot = lax.rem(i, problem.stages)
        keys = refs.k_pages, refs.k_smem, refs.k_scales, refs.k_scales_smem, refs.k_full
        values = refs.v_pages, refs.v_smem, refs.v_scales, refs.v_scales_smem, refs.v_full
        for pages, target, scales, scales_smem, full in (keys, values):
            source = pages.at[page, pl.ds(0, problem.page_size), head]
            plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])
            if scales is not None:
                source = scales.at[page, 0, head]
                plgpu.copy_gmem_to_smem(source, scales_smem.at[slot], full.at[slot])

    @pl.when(count > 0)
    def _():
        # Of other heads and of the rows that are not copied nobody reads what comes out.
        first_row = pl.multiple_of(lax.div(head * problem.groups, UNIT) * UNIT, UNIT)
        source = refs.q.at[sequence, pl.ds(first_row, problem.window)]
        plgpu.copy_gmem_to_smem(source, refs.q_smem.at[pl.ds(0, problem.window)], refs.q_full)
        for i in map(jnp.int32, range(problem.stages)):
            pl.when(i < count)(functools.partial(fetch, i, page_at(i)))
        plgpu.barrier_wait(refs.q_full)

    def visible(i):
        return low - number_at(i) * problem.page_size, high - number_at(i) * problem.page_size

    def step(i, carry):
        o, total, top = carry
        slot = lax.rem(i, problem.stages)
        later = i + problem.stages
        page = page_at(later)  # read early: the wait for it would hold up the fetch
        plgpu.barrier_wait(refs.k_full.at[slot])
        keys = _converted(refs.k_smem.at[slot], refs.k_wide)
        logits = _logits(refs.q_smem, keys, problem)
        if problem.is_narrow:
            logits = _scaled(logits, refs.k_scales_smem.at[slot])
        p, shrink, top = _softmax(logits, top, *visible(i), problem)
        total = total * shrink + p.sum(axis=1)
        o = o * spread(shrink, o.shape, 0)
        plgpu.barrier_wait(refs.v_full.at[slot])
        if problem.is_narrow:
            p = _scaled(p, refs.v_scales_smem.at[slot]) * SHIFT
        p = p.astype(refs.q_smem.dtype)
        values = _converted(refs.v_smem.at[slot], refs.v_wide)

        def product(o_ref):
            multiply(o_ref, p, values, refs.p_smem)
            return ()

        (o,), _ = accumulate((o,), product, (), interpret=interpret)
        pl.when(later < count)(functools.partial(fetch, later, page))
        return o, total, top

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, problem.head_dim), jnp.float32), MATRIX)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
    start = zeros, total, minus_infinity(ROWS)
    o, total, top = lax.fori_loop(0, count, step, start)
    total = jnp.where(total == 0.0, 1.0, total)
    o = o * spread((1 / SHIFT if problem.is_narrow else 1.0) / total, o.shape, 0)
    refs.o_smem[...] = o.astype(refs.o_smem.dtype)
    refs.lse_smem[...] = top * (1 / LOG2E) + jnp.log(total)
    plgpu.commit_smem()
    own = pl.ds(lax.rem(head * problem.groups, problem.window), problem.groups)
    plgpu.copy_smem_to_gmem(refs.o_smem.at[own], refs.o.at[sequence, head, stream])
    if problem.num_streams > 1:
        lse = refs.lse_smem.at[pl.ds(0, problem.window)]
        plgpu.copy_smem_to_gmem(lse, refs.lse.at[sequence, head, stream])
    plgpu.wait_smem_to_gmem(0)


def _scaled(x: Array, scales: Any) -> Array:
    """x [ROWS, page size] times the scales of the keys or values."""
    factors = plgpu.load(scales, layout=COLUMN).astype(jnp.float32)
    return x * spread(factors, x.shape, 1)


def _converted(page: Any, wide: Any) -> Any:
    """A page as the tensor cores take it: itself, or in `wide` if that is given."""
    if wide is None:
        return page
    wide[...] = plgpu.load(page, layout=NARROW_LAYOUT).astype(wide.dtype)
    plgpu.commit_smem()
    return wide


def _logits(q: Any, keys: Any, problem: Problem) -> Array:
    """Logits [ROWS, page size] before scale and soft-cap."""

    def scores(logits_ref):
        plgpu.wgmma(logits_ref, q, keys.transpose((1, 0)))
        return logits_ref[...]

    return pl.run_scoped(scores, plgpu.ACC((ROWS, problem.page_size), jnp.float32))


def _softmax(
    logits: Array,
    top: Array,
    low: Any,
    high: Any,
    problem: Problem,
) -> tuple[Array, Array, Array]:
    """One step of the online softmax, in powers of two.

    Args:
        logits: [ROWS, page size].
        top: [ROWS] the largest logit of each query so far.
        low, high: the keys of this page that are seen.
    Returns:
        (exponentials, factors by which the old sums shrink, the new maxima).
    """
    factor, cap = problem.scale * LOG2E, problem.softcap
    if cap is not None:
        logits = tanh(logits * (problem.scale / cap))
        factor = cap * LOG2E
    key = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=MATRIX)
    logits = jnp.where((key >= low) & (key < high), logits, -jnp.inf)
    new = jnp.maximum(top, logits.max(axis=1) * factor)
    # A page of which nothing is seen leaves -inf, and -inf - -inf would be NaN.
    safe = jnp.where(new == -jnp.inf, 0.0, new)
    p = jnp.exp2(logits * factor - spread(safe, logits.shape, 0))
    return p, jnp.exp2(top - safe), new
