"""What both kernels over pages share: a warpgroup that reads pages and adds up what they hold.

It fetches some pages ahead by itself, so that no warpgroup has to be told when a page's place is
free. Keys and values of 8 bits are converted to float16 on their way, in which they are exact, and
so are the queries; scales multiply the logits and the weights.

Source: Dao 2023 (arXiv 2307.08691), algorithm 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from jaxscale.kernels.persistent import LOG2E, ROWS, swizzled

# Weights times scales of values are multiplied in float16, which has few digits below 2^-14.
SHIFT = 2.0**8
MASK_TYPE = jnp.bfloat16  # 1 for a key that is seen, else 0
# How 8 bits lie in registers while they are converted.
NARROW_LAYOUT = plgpu.Layout.WGMMA_UPCAST_4X
# Of pages in shared memory, so that two blocks fit a multiprocessor; 72 KiB for heads of 96.
PAGES_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Reading:
    """How pages are read.

    Args:
        page_size: keys in a page.
        head_dim: H.
        scale: factor on the logits.
        softcap: c in c * tanh(logits / c); None for none.
        is_narrow: whether pages have 8 bits a value.
    """

    page_size: int
    head_dim: int
    scale: float
    softcap: float | None
    is_narrow: bool

    @classmethod
    def of(
        cls,
        k_pages: Array,
        scale: float,
        softcap: float | None,
    ) -> "Reading":
        """For pages [pages, page size, K, H]."""
        _, page_size, _, head_dim = k_pages.shape
        is_narrow = k_pages.dtype.itemsize == 1
        return cls(page_size, head_dim, scale, softcap, is_narrow)

    @property
    def stages(self) -> int:
        """Pages of keys, and of values, in shared memory."""
        num_elements = 2 * self.page_size * self.head_dim  # of a page of keys and one of values
        if not self.is_narrow:
            return max(-(-PAGES_BYTES // (2 * num_elements)), 2)
        converted_bytes = 2 * num_elements
        return max((PAGES_BYTES - converted_bytes) // num_elements, 2)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a swizzled tile, which divide those of a head's key or value."""
        return 128 if self.head_dim % 64 == 0 else 64

    def wide(self, q_type: Any) -> Any:
        """The type that the tensor cores multiply."""
        return jnp.float16 if self.is_narrow else q_type


class Source(NamedTuple):
    """Pages in global memory, as references; scales are None but for pages of 8 bits."""

    k_pages: Any
    v_pages: Any
    k_scales: Any
    v_scales: Any

    @classmethod
    def of(cls, refs: Sequence[Any]) -> "Source":
        """From two references, or four."""
        return cls(*refs, *(None,) * (4 - len(refs)))


class Buffers(NamedTuple):
    """Shared memory of a stream, and its barriers."""

    q: Any
    k: Any
    v: Any
    # Barriers: a copy has come.
    k_full: Any
    v_full: Any
    # For pages of 8 bits: their scales, and a page in float16.
    k_scales: Any
    v_scales: Any
    k_wide: Any
    v_wide: Any
    # Which of a page's keys are seen, if a mask says so.
    mask: Any
    # What interpretation needs.
    p: Any


def buffer_types(
    reading: Reading,
    pages_type: Any,
    q_type: Any,
    interpret: Any,
    *,
    has_mask: bool = False,
) -> Buffers:
    """What `Buffers` are made of."""
    page, stages = (reading.page_size, reading.head_dim), reading.stages
    pages = swizzled((stages, *page), pages_type, reading.row_bytes)
    num_copies = 2 if reading.is_narrow else 1
    k_full = plgpu.Barrier(num_arrivals=num_copies + has_mask, num_barriers=stages)
    v_full = plgpu.Barrier(num_arrivals=num_copies, num_barriers=stages)
    wide = reading.wide(q_type)
    converted, scales = None, None
    if reading.is_narrow:
        converted = swizzled(page, wide, reading.row_bytes)
        scales = plgpu.SMEM((stages, reading.page_size), jnp.bfloat16)
    return Buffers(
        q=swizzled((ROWS, reading.head_dim), wide, reading.row_bytes),
        k=pages,
        v=pages,
        k_full=k_full,
        v_full=v_full,
        k_scales=scales,
        v_scales=scales,
        k_wide=converted,
        v_wide=converted,
        mask=plgpu.SMEM((stages, reading.page_size), MASK_TYPE) if has_mask else None,
        p=plgpu.SMEM((ROWS, reading.page_size), wide) if interpret else None,
    )


@dataclasses.dataclass(frozen=True)
class Stream:
    """The pages that a warpgroup reads for ROWS rows of queries of one kv head.

    Args:
        source: the pages.
        buffers: shared memory.
        reading: how they are read.
        head: the kv head.
        count: pages.
        page_at: i -> the number of the i-th page.
        interpret: JAX's parameters of interpretation, or False.
        mask_at: i -> which keys of the i-th page are seen [page size] MASK_TYPE, as a reference;
            None where `attend` is told all.
    """

    source: Source
    buffers: Buffers
    reading: Reading
    head: Any
    count: Any
    page_at: Callable
    interpret: Any
    mask_at: Callable | None = None

    def start(self, before_first: Callable = lambda: None) -> None:
        """Fetches as many pages as there is room for; the first one behind `before_first`."""
        for i in map(jnp.int32, range(1, self.reading.stages)):
            pl.when(i < self.count)(functools.partial(self._fetch, i, self._page_at(i)))
        before_first()
        first = jnp.int32(0)
        pl.when(first < self.count)(functools.partial(self._fetch, first, self._page_at(first)))

    def attend(
        self,
        runs: Sequence[tuple[Any, Any, Callable | None]],
    ) -> tuple[Array, Array]:
        """Attention of the queries in shared memory over all pages.

        Args:
            runs: (first, end, i -> [ROWS, page size] bool of the keys of page i that rows see, or
                None where they see all) of pages, one run after the other.
        Returns:
            ([ROWS, H] float32, 0 where a row sees nothing; the logarithm of the softmax'
            denominator [ROWS]).
        """
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, self.reading.head_dim), jnp.float32), MATRIX)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        carry = zeros, total, minus_infinity(ROWS)
        for first, end, visible in runs:
            carry = lax.fori_loop(first, end, functools.partial(self._step, visible), carry)
        o, total, top = carry
        total = jnp.where(total == 0.0, 1.0, total)
        o = o * spread((1 / SHIFT if self.reading.is_narrow else 1.0) / total, o.shape, 0)
        return o, top * (1 / LOG2E) + jnp.log(total)

    def _page_at(self, i: Any) -> Any:
        return self.page_at(jnp.minimum(i, self.count - 1))

    def _fetch(self, i: Any, page: Any) -> None:
        source, buffers = self.source, self.buffers
        slot = lax.rem(i, self.reading.stages)
        keys = source.k_pages, buffers.k, source.k_scales, buffers.k_scales, buffers.k_full
        values = source.v_pages, buffers.v, source.v_scales, buffers.v_scales, buffers.v_full
        for pages, target, scales, scales_smem, full in (keys, values):
            whole = pages.at[page, pl.ds(0, self.reading.page_size), self.head]
            plgpu.copy_gmem_to_smem(whole, target.at[slot], full.at[slot])
            if scales is not None:
                of_page = scales.at[page, 0, self.head]
                plgpu.copy_gmem_to_smem(of_page, scales_smem.at[slot], full.at[slot])
        if self.mask_at is not None:
            mask = buffers.mask.at[slot]
            plgpu.copy_gmem_to_smem(self.mask_at(i), mask, buffers.k_full.at[slot])

    def _step(self, visible: Callable | None, i: Any, carry: tuple) -> tuple:
        o, total, top = carry
        buffers, is_narrow = self.buffers, self.reading.is_narrow
        slot = lax.rem(i, self.reading.stages)
        later = i + self.reading.stages
        page = self._page_at(later)  # read early: the wait for it would hold up the fetch
        plgpu.barrier_wait(buffers.k_full.at[slot])
        keys = _converted(buffers.k.at[slot], buffers.k_wide)
        logits = _logits(buffers.q, keys, self.reading)
        if is_narrow:
            logits = _scaled(logits, buffers.k_scales.at[slot])
        sees = visible and visible(i)
        if self.mask_at is not None:
            in_mask = _in_mask(buffers.mask.at[slot], logits.shape)
            sees = in_mask if sees is None else sees & in_mask
        p, shrink, top = _softmax(logits, top, sees, self.reading)
        total = total * shrink + p.sum(axis=1)
        o = o * spread(shrink, o.shape, 0)
        plgpu.barrier_wait(buffers.v_full.at[slot])
        if is_narrow:
            p = _scaled(p, buffers.v_scales.at[slot]) * SHIFT
        p = p.astype(buffers.q.dtype)
        values = _converted(buffers.v.at[slot], buffers.v_wide)

        def product(o_ref):
            multiply(o_ref, p, values, buffers.p)
            return ()

        (o,), _ = accumulate((o,), product, (), interpret=self.interpret)
        if self.mask_at is not None:
            # A warp may still read the mask in whose place the next one is put.
            plgpu.commit_smem()
        pl.when(later < self.count)(functools.partial(self._fetch, later, page))
        return o, total, top


def _in_mask(mask: Any, shape: tuple[int, int]) -> Array:
    """[ROWS, page size] whether the mask of a page has a key."""
    return spread(plgpu.load(mask, layout=COLUMN).astype(jnp.float32), shape, 1) != 0.0


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


def _logits(q: Any, keys: Any, reading: Reading) -> Array:
    """Logits [ROWS, page size] before scale and soft-cap."""

    def scores(logits_ref):
        plgpu.wgmma(logits_ref, q, keys.transpose((1, 0)))
        return logits_ref[...]

    return pl.run_scoped(scores, plgpu.ACC((ROWS, reading.page_size), jnp.float32))


def _softmax(
    logits: Array,
    top: Array,
    visible: Array | None,
    reading: Reading,
) -> tuple[Array, Array, Array]:
    """One step of the online softmax, in powers of two.

    Args:
        logits: [ROWS, page size].
        top: [ROWS] the largest logit of each query so far.
        visible: [ROWS, page size] the keys that are seen; None for all.
        reading: scale and soft-cap.
    Returns:
        (exponentials, factors by which the old sums shrink, the new maxima).
    """
    factor, cap = reading.scale * LOG2E, reading.softcap
    if cap is not None:
        logits = tanh(logits * (reading.scale / cap))
        factor = cap * LOG2E
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    new = jnp.maximum(top, logits.max(axis=1) * factor)
    # A page of which nothing is seen leaves -inf, and -inf - -inf would be NaN.
    safe = jnp.where(new == -jnp.inf, 0.0, new)
    p = jnp.exp2(logits * factor - spread(safe, logits.shape, 0))
    return p, jnp.exp2(top - safe), new
