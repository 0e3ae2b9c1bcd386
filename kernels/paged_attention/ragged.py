"""Attention of sequences with one or many new tokens over pages, in one launch, for Hopper GPUs.

A block is one warpgroup with a tile of a sequence's tokens and the query heads of one kv head: the
64 rows that the tensor cores multiply. Of a sequence that decodes a tile has one token. Tiles of
prompts and of decoding sequences are mixed, so that a multiprocessor, which holds two blocks,
multiplies for prompts while it waits for the pages of long sequences.

Source: Dao 2023 (arXiv 2307.08691), algorithm 1; Kwon et al. 2023 (arXiv 2309.06180), section 4.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.kernels.attention.products import MATRIX
from jaxscale.kernels.attention.tiles import BlockLayout
from jaxscale.kernels.paged_attention.seen_pages import SeenPages
from jaxscale.kernels.paged_attention.stream import (
    Buffers,
    Reading,
    Source,
    Stream,
    buffer_types,
)
from jaxscale.kernels.persistent import ROWS

UNIT = 8  # rows of a swizzled tile
MAX_GROUPS = ROWS // UNIT


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and settings that a kernel is compiled for.

    Args:
        groups: query heads that read one kv head.
        window: a token sees as many keys up to its own; None for all.
        layout: which pages, as blocks, each head sees; None for all.
        reading: how pages are read.
    """

    groups: int
    window: int | None
    layout: BlockLayout | None
    reading: Reading

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile, a power of two; each has a row for every head of the group."""
        return 1 << (ROWS // self.groups).bit_length() - 1


class Sequences(NamedTuple):
    """New tokens of sequences, [R] int32 each, as in `api.ragged_attention`."""

    first_token: Array
    num_tokens: Array
    position: Array
    first_page: Array


class Tiles(NamedTuple):
    """What each block computes, [tiles] int32 each: rows `start` to `end` of a tile.

    A tile begins at a token that is a multiple of UNIT, because the hardware copies whole units
    into shared memory, and at its position in the sequence, which is negative where the tile's
    first tokens are another sequence's. A tile of padding has no rows.
    """

    first_token: Array
    start: Array
    end: Array
    position: Array
    first_page: Array


SETTINGS = ("num_single", "window", "scale", "softcap", "layout", "interpret")


# jit: the kernel is lowered once for all layers.
@functools.partial(jax.jit, static_argnames=SETTINGS)
def ragged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    pages: Array,
    sequences: Sequences,
    scales: tuple[Array, Array] | None = None,
    *,
    num_single: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    layout: BlockLayout | None = None,
    interpret: Any = False,
) -> Array:
    """As `api.ragged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    reading = Reading.of(k_pages, scale, softcap)
    problem = Problem(num_heads // kv_heads, window, layout, reading)
    tiles = _tiles(sequences, num_tokens, num_single, problem.tile_tokens)
    queries = q.astype(reading.wide(q.dtype))
    operands = (*tiles, pages, queries, k_pages, v_pages, *(scales or ()))

    def body(*refs):
        source, others = Source.of(refs[7 : len(operands)]), refs[len(operands) :]
        own = Tiles(*refs[:5])
        _run(_Refs(own, *refs[5:7], source, *others[:3], Buffers(*others[3:])), problem, interpret)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            plgpu.SMEM((UNIT + ROWS, head_dim), q.dtype),
            plgpu.Barrier(num_arrivals=problem.groups),
            *buffer_types(reading, k_pages.dtype, q.dtype, interpret),
        ),
        grid=(len(tiles.position), kv_heads),
        grid_names=("tile", "head"),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=True,
        ),
        interpret=interpret,
    )
    return kernel(*operands)


def _tiles(
    sequences: Sequences,
    num_tokens: int,
    num_single: int,
    size: int,
) -> Tiles:
    """The sequences cut into tiles of `size` tokens, in an order that mixes long and short."""
    num_longer = len(sequences.position) - num_single
    num_tiles = num_single + num_longer + (num_tokens + (UNIT - 1) * num_longer) // size
    start = sequences.first_token % UNIT
    num_own = jnp.where(sequences.num_tokens > 0, -(-(start + sequences.num_tokens) // size), 0)
    ends = jnp.cumsum(num_own)
    number = jnp.asarray(_mixed(num_tiles), jnp.int32)
    owner = (number[:, None] >= ends).sum(1, dtype=jnp.int32)
    is_tile = owner < len(ends)
    owner = jnp.minimum(owner, len(ends) - 1)
    before = (number - (ends - num_own)[owner]) * size  # tokens of the tiles in front
    start, last = start[owner], (start + sequences.num_tokens)[owner]
    return Tiles(
        first_token=sequences.first_token[owner] - start + before,
        start=jnp.maximum(start - before, 0),
        end=jnp.where(is_tile, jnp.clip(last - before, 0, size), 0),
        position=sequences.position[owner] - start + before,
        first_page=sequences.first_page[owner],
    )


def _mixed(num: int) -> np.ndarray:
    """0 ... num - 1 in steps of the golden section, so that neighbours come from all parts."""
    step = max(round(num * (math.sqrt(5) - 1) / 2), 1)
    while math.gcd(step, num) > 1:
        step += 1
    return np.arange(num) * step % num


class _Refs(NamedTuple):
    """A kernel's references: to its operands and result in global memory, then to its scratch."""

    tiles: Tiles
    pages: Any
    q: Any
    source: Source
    o: Any
    # Shared memory.
    o_smem: Any
    # A barrier: the queries have come.
    q_full: Any
    buffers: Buffers


def _run(refs: _Refs, problem: Problem, interpret: Any) -> None:
    """One tile and kv head."""
    tile, head = lax.axis_index("tile"), lax.axis_index("head")
    first_token, start, end, position, first_page = (each[tile] for each in refs.tiles)
    first_token = pl.multiple_of(first_token, UNIT)
    size, window, page_size = problem.tile_tokens, problem.window, problem.reading.page_size
    # Pages from the first one of which a row sees a key, and of those the ones of which all rows
    # see all keys.
    first = jnp.int32(0)
    if window is not None:
        first = lax.div(jnp.maximum(position + start + 1 - window, 0), page_size)
    last = lax.div(position + end + page_size - 1, page_size)
    seen = SeenPages.of(problem.layout, problem.groups, head, (first, last), position + start)
    count = seen.count
    whole_end = seen.place(lax.div(position + start + 1, page_size))
    whole_first = jnp.int32(0)
    if window is not None:
        unseen = jnp.maximum(position + end - window, 0)  # keys that the last row does not see
        whole_first = jnp.minimum(seen.place(lax.div(unseen + page_size - 1, page_size)), count)
    if problem.layout is not None:
        # The last row's local pages are those of all rows.
        own = lax.div(position + end - 1, page_size) - (problem.layout.local - 1)
        own = seen.place(jnp.maximum(own, seen.local))
        whole_first = jnp.minimum(jnp.maximum(whole_first, own), count)
    whole_end = jnp.maximum(whole_end, whole_first)

    def visible(i):
        key = plgpu.broadcasted_iota(jnp.int32, (ROWS, page_size), 1, layout=MATRIX)
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, page_size), 0, layout=MATRIX)
        page = seen.page(i)
        # How far a key is behind its token, of which every head has a row.
        token = row & (size - 1)
        behind = token - key + (position - page * page_size)
        sees = behind >= 0
        if window is not None:
            sees &= behind < window
        if problem.layout is not None:
            sees &= seen.is_seen(lax.div(row, size), position + token, page)
        return sees

    stream = Stream(
        refs.source,
        refs.buffers,
        problem.reading,
        head,
        count,
        page_at=lambda i: refs.pages[first_page + seen.page(i)],
        interpret=interpret,
    )

    def fetch_queries(num_rows):
        for group in range(problem.groups):
            queries = refs.q.at[pl.ds(first_token, num_rows), head * problem.groups + group]
            own = refs.buffers.q.at[pl.ds(group * size, num_rows)]
            plgpu.copy_gmem_to_smem(queries, own, refs.q_full)

    def store(offset, num_rows):
        for group in range(problem.groups):
            rows = refs.o_smem.at[pl.ds(UNIT + group * size + offset, num_rows)]
            token = first_token + start + offset
            place = refs.o.at[pl.ds(token, num_rows), head * problem.groups + group]
            plgpu.copy_smem_to_gmem(rows, place)

    @pl.when(end > start)
    def _():
        # Of rows that are not copied nobody reads what comes out.
        pl.when(end <= UNIT)(functools.partial(fetch_queries, UNIT))
        pl.when(end > UNIT)(functools.partial(fetch_queries, size))
        stream.start()
        plgpu.barrier_wait(refs.q_full)
        is_whole = window is None and problem.layout is None
        partly = [] if is_whole else [(0, whole_first, visible)]
        runs = [*partly, (whole_first, whole_end, None), (whole_end, count, visible)]
        o, _ = stream.attend(runs)
        # The rows before and behind are other tiles', so these are stored in powers of two. Each
        # copy has to begin at a multiple of 128 bytes, and so at an even row where heads have 96:
        # the first row lies at UNIT, and every other copy begins an even number of rows behind it.
        refs.o_smem[pl.ds(UNIT - start, ROWS)] = o.astype(refs.o_smem.dtype)
        plgpu.commit_smem()
        num, num_rows = end - start, size
        while num_rows:
            offset = num - lax.rem(num, 2 * num_rows)
            pl.when(num & num_rows > 0)(functools.partial(store, offset, num_rows))
            num_rows //= 2
        plgpu.wait_smem_to_gmem(0)
