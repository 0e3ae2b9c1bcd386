"""Attention of single queries over pages for Hopper GPUs, as a Pallas kernel for Mosaic GPU.

A block is one warpgroup that reads a stream of pages of one sequence and kv head. The tensor cores
multiply 64 rows, of which a kv head's queries fill a few: reading the pages takes longer than that.
Where there are fewer sequences and heads than the GPU has room for, the pages of each are dealt out
to several streams, whose results are added up by their normalisers.

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

from jaxscale.kernels.attention.products import MATRIX
from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.kernels.paged_attention.seen_pages import SeenPages
from jaxscale.kernels.paged_attention.stream import (
    MASK_TYPE,
    Buffers,
    Reading,
    Source,
    Stream,
    buffer_types,
)
from jaxscale.kernels.persistent import NUM_SMS, ROWS

MAX_GROUPS = ROWS
UNIT = 8  # rows of a swizzled tile
BLOCKS_PER_SM = 2
GRID_NAMES = ("sequence", "head", "stream")
COMPILER_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    approx_math=True,
)
COPY_ALIGNMENT = 128  # bytes; where a copy from shared memory may begin


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and settings that a kernel is compiled for.

    Args:
        groups: query heads that read one kv head; they divide UNIT, or UNIT divides them.
        num_streams: blocks among which the pages of a sequence and kv head are dealt out.
        own_groups: those of them that are no padding.
        reading: how pages are read.
        layout: which pages, as blocks, each head sees; None for all.
        new_heads: where the heads of the new keys and values begin behind those of the queries, if
            the kernel writes them to their pages.
    """

    groups: int
    num_streams: int
    own_groups: int
    reading: Reading
    layout: BlockLayout | None
    new_heads: tuple[int, int] | None = None

    @property
    def window(self) -> int:
        """Rows of queries that a block reads: whole tiles, which may hold other heads' too."""
        return max(self.groups, UNIT)


# jit: the kernel is lowered once for all layers.
@functools.partial(
    jax.jit, static_argnames=("scale", "softcap", "layout", "is_invariant", "interpret")
)
def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    low: Array,
    high: Array,
    scales: tuple[Array, Array] | None = None,
    mask: Array | None = None,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
    is_invariant: bool = False,
    interpret: Any = False,
) -> Array:
    """As `api.paged_attention`."""
    num, num_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    own_groups = num_heads // kv_heads
    groups = own_groups
    num_streams = 1 if is_invariant else _num_streams(num * kv_heads, block_table)
    # Several streams write their normalisers, at least UNIT of them at a time.
    is_padded = num_streams > 1 or num_heads % UNIT or (UNIT % groups and groups % UNIT)
    is_padded |= groups * head_dim * q.dtype.itemsize % COPY_ALIGNMENT != 0
    if is_padded:
        groups = pl.cdiv(groups, UNIT) * UNIT
    reading = Reading.of(k_pages, scale, softcap)
    problem = Problem(groups, num_streams, own_groups, reading, layout)
    wide = reading.wide(q.dtype)
    grouped = q.astype(wide).reshape(num, kv_heads, own_groups, head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, groups - own_groups), (0, 0)))
    grouped = grouped.reshape(num, -1, head_dim)

    operands = [block_table, low, high, grouped, k_pages, v_pages, *(scales or ())]
    num_paged = len(operands)
    if mask is not None:
        operands.append(mask.astype(MASK_TYPE).reshape(len(mask), -1, reading.page_size))

    def body(*refs):
        source, others = Source.of(refs[4:num_paged]), refs[len(operands) :]
        of_mask = None if mask is None else refs[num_paged]
        own = _Refs(*refs[:4], source, *others[:5], None, None, Buffers(*others[5:]), of_mask)
        _run(own, problem, interpret)

    shape = (num, kv_heads, problem.num_streams)
    kernel = plgpu.kernel(
        body,
        out_type=_out_types(shape, problem, q.dtype),
        scratch_types=_scratch_types(
            problem, k_pages.dtype, q.dtype, interpret, has_mask=mask is not None
        ),
        grid=shape,
        grid_names=GRID_NAMES,
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )
    o, lse = kernel(*operands)
    o = _joined(o, lse)[:, :, :own_groups]
    return o.reshape(q.shape).astype(q.dtype)


# jit: the kernel is lowered once for all layers.
@functools.partial(jax.jit, static_argnames=("scale", "softcap", "layout", "interpret"))
def write_and_attend(
    q: Array,
    new: tuple[Array, Array],
    pages: tuple[Array, Array],
    block_table: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
    interpret: Any = False,
) -> tuple[Array, tuple[Array, Array]]:
    """As `api.write_and_attend`."""
    num, num_heads, head_dim = q.shape
    kv_heads = pages[0].shape[2]
    groups = num_heads // kv_heads
    problem = Problem(
        groups=groups,
        num_streams=_num_streams(num * kv_heads, block_table),
        own_groups=groups,
        reading=Reading.of(pages[0], scale, softcap),
        layout=layout,
        new_heads=(num_heads, num_heads + kv_heads),
    )
    shape = (num, kv_heads, problem.num_streams)
    o_type, lse_type = _out_types(shape, problem, q.dtype)
    own_types = (plgpu.SMEM((2, head_dim), q.dtype), plgpu.Barrier(num_arrivals=2))
    scratch_types = _scratch_types(problem, q.dtype, q.dtype, interpret)

    def body(block_table, low, high, heads, k_pages, v_pages, o, lse):
        operands = block_table, low, high, heads, Source.of((k_pages, v_pages)), o, lse

        def run(*scratch):
            refs = _Refs(*operands, *scratch[:5], Buffers(*scratch[5:]))
            _run(refs, problem, interpret)

        pl.run_scoped(run, *scratch_types[:3], *own_types, *scratch_types[3:])

    kernel = pl.kernel(
        body,
        out_type=(o_type, lse_type),
        mesh=plgpu.Mesh(grid=shape, grid_names=GRID_NAMES),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )
    # One array, because XLA rotates and joins all heads in one kernel then.
    heads = jnp.concatenate([q, *new], axis=1)
    # References, because only what is one is written in place.
    references = tuple(jax.new_ref(each) for each in pages)
    o, lse = kernel(block_table, low, high, heads, *references)
    o = _joined(o, lse[..., :groups])
    k_pages, v_pages = (jax.freeze(each) for each in references)
    return o.reshape(q.shape).astype(q.dtype), (k_pages, v_pages)


def _num_streams(num_readers: int, block_table: Array) -> int:
    """Among how many blocks the pages of each sequence and head are dealt out."""
    return max(min(BLOCKS_PER_SM * NUM_SMS // num_readers, block_table.shape[1]), 1)


def _out_types(shape: tuple[int, int, int], problem: Problem, dtype: Any) -> tuple[Any, Any]:
    """Results and normalisers of all streams."""
    head_dim = problem.reading.head_dim
    return (
        jax.ShapeDtypeStruct((*shape, problem.groups, head_dim), dtype),
        jax.ShapeDtypeStruct((*shape, problem.window), jnp.float32),
    )


def _scratch_types(
    problem: Problem,
    pages_type: Any,
    dtype: Any,
    interpret: Any,
    *,
    has_mask: bool = False,
) -> tuple[Any, ...]:
    """Shared memory and barriers in the order of `_Refs`, without those of new keys."""
    return (
        plgpu.SMEM((ROWS, problem.reading.head_dim), dtype),
        plgpu.SMEM((ROWS,), jnp.float32),
        plgpu.Barrier(),
        *buffer_types(problem.reading, pages_type, dtype, interpret, has_mask=has_mask),
    )


def _joined(o: Array, lse: Array) -> Array:
    """Results of streams o [D, K, streams, G, H] and their lse [D, K, streams, G] added up.

    Written out stream by stream, which XLA makes two kernels of; of reductions it makes more.
    """
    num_streams = o.shape[2]
    if num_streams == 1:
        return o[:, :, 0]
    parts = [o[:, :, number] for number in range(num_streams)]
    # Spread over the head dim first, so that the weights are in the kernel that uses them.
    sizes = [
        jnp.broadcast_to(lse[:, :, number, :, None], part.shape)
        for number, part in enumerate(parts)
    ]
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
    source: Source
    o: Any
    lse: Any
    # Shared memory.
    o_smem: Any
    lse_smem: Any
    # A barrier: the queries have come.
    q_full: Any
    # A new key and value, and their barrier, if they are written.
    new_smem: Any
    new_full: Any
    buffers: Buffers
    # In global memory: [rows, P, page size], or None.
    mask: Any = None


def _run(refs: _Refs, problem: Problem, interpret: Any) -> None:
    """One stream of one sequence and kv head."""
    sequence, head, number = map(lax.axis_index, ("sequence", "head", "stream"))
    page_size = problem.reading.page_size
    low, high = refs.low[sequence], refs.high[sequence]
    first = lax.div(low, page_size)
    end = lax.div(high + page_size - 1, page_size)
    every = SeenPages.of(problem.layout, problem.own_groups, head, (first, end), high - 1)
    seen = every.after(number)
    count = lax.div(seen.count + problem.num_streams - 1, problem.num_streams)
    count = jnp.where(high > low, jnp.maximum(count, 0), 0)

    own_head = head * problem.groups
    # Whole units of rows are copied. From a row within a unit on its rest comes, and then zeros.
    own_row = 0 if problem.new_heads else lax.rem(own_head, problem.window)

    def number_at(i):
        # The last page comes first, as in the kernel for prompts, whose sums are to be the same.
        return seen.page((count - 1 - i) * problem.num_streams)

    def visible(i):
        page = number_at(i)
        before = page * page_size
        key = plgpu.broadcasted_iota(jnp.int32, (ROWS, page_size), 1, layout=MATRIX)
        sees = (key >= low - before) & (key < high - before)
        if problem.layout is None:
            return sees
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, page_size), 0, layout=MATRIX)
        return sees & seen.is_seen(row - own_row, high - 1, page)

    def mask_at(i):
        row = lax.div(sequence, refs.low.shape[0] // refs.mask.shape[0])
        return refs.mask.at[row, number_at(i)]

    pages = Stream(
        refs.source,
        refs.buffers,
        problem.reading,
        head,
        count,
        page_at=lambda i: refs.block_table[sequence, number_at(i)],
        interpret=interpret,
        mask_at=None if refs.mask is None else mask_at,
    )

    @pl.when(count > 0)
    def _():
        # Of other heads and of the rows that are not copied nobody reads what comes out.
        queries = refs.q.at[sequence, pl.ds(own_head - own_row, problem.window)]
        own = refs.buffers.q.at[pl.ds(0, problem.window)]
        plgpu.copy_gmem_to_smem(queries, own, refs.q_full)

        def write():
            # The stream that reads the last page, its first one, puts the new key there before.
            last = lax.div(high - 1, page_size)
            put = functools.partial(_write, refs, problem, (sequence, head, last))
            pl.when(number_at(0) == last)(put)

        pages.start(write) if problem.new_heads else pages.start()
        plgpu.barrier_wait(refs.q_full)

    o, lse = pages.attend([(0, count, visible)])
    refs.o_smem[...] = o.astype(refs.o_smem.dtype)
    refs.lse_smem[...] = lse
    plgpu.commit_smem()
    own = pl.ds(own_row, problem.groups)
    plgpu.copy_smem_to_gmem(refs.o_smem.at[own], refs.o.at[sequence, head, number])
    if problem.num_streams > 1:
        lse_rows = refs.lse_smem.at[pl.ds(0, problem.window)]
        plgpu.copy_smem_to_gmem(lse_rows, refs.lse.at[sequence, head, number])
    plgpu.wait_smem_to_gmem(0)


def _write(refs: _Refs, problem: Problem, place: tuple[Any, Any, Any]) -> None:
    """Copies the new key and value of a (sequence, kv head, page of the sequence) there."""
    sequence, head, page_number = place
    for i, first in enumerate(problem.new_heads):
        source = refs.q.at[sequence, first + head]
        plgpu.copy_gmem_to_smem(source, refs.new_smem.at[i], refs.new_full)
    plgpu.barrier_wait(refs.new_full)
    page = refs.block_table[sequence, page_number]
    row = lax.rem(refs.high[sequence] - 1, problem.reading.page_size)
    for i, target in enumerate((refs.source.k_pages, refs.source.v_pages)):
        plgpu.copy_smem_to_gmem(refs.new_smem.at[i], target.at[page, row, head])
    plgpu.wait_smem_to_gmem(0)
