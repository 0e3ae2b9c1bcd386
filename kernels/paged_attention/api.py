"""Attention over the pages that hold a sequence's keys, of one new token or of many."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout
from jaxscale.kernels.checks import check_backend, check_invariant, require
from jaxscale.kernels.paged_attention import pallas, ragged, reference
from jaxscale.kernels.paged_attention.ragged import Sequences
from jaxscale.kernels.triton_call import missing

BACKENDS = ("reference", "mosaic", "triton")
RAGGED_BACKENDS = WRITING_BACKENDS = ("reference", "mosaic")
HEAD_DIMS = {"mosaic": (64, 96, 128, 256), "triton": (64, 128, 256)}
PAGE_SIZES = {"mosaic": (64, 128), "triton": (16, 32, 64, 128)}
WARPGROUP = 128  # threads, each of which takes part in the copy of a new key or value
NARROW_TYPES = (jnp.int8, jnp.float8_e4m3fn)


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
    softcap: float | None = None,
    layout: BlockLayout | None = None,
    is_invariant: bool = False,
    implementation: str,
    interpret: Any = False,
) -> Array:
    """Softmax attention of each sequence's query over its keys low <= s < high.

    Key s of sequence d lies in page block_table[d, s // page size].

    Source: Kwon et al. 2023, PagedAttention (arXiv 2309.06180), section 4.1; Dao et al. 2023,
        Flash-Decoding, for the split over keys.
    Args:
        q: [D, N, H].
        k_pages, v_pages: [pages, page size, K, H]; query head n reads kv head n // (N / K).
        block_table: [D, P] int32.
        scales: of keys and of values of 8 bits, [pages, 1, K, page size] bfloat16 each; None where
            they have the type of `q`.
        low, high: [D] int32, within 0 and P * page size; a query with high <= low sees nothing.
        mask: [R, P * page size] bool, R dividing D: which of the keys between low and high are
            seen, any set of them, by the D / R sequences that follow one another; None for all.
            A value that is not seen must be finite in a page that is read.
        scale: factor on the logits.
        softcap: c in c * tanh(logits / c); None for none.
        layout: which blocks of keys each head sees, of a query at high - 1; None for all.
        is_invariant: whether a result's bits may depend on its own sequence alone; in pages of 64
            keys they are then those of `attention.api.attention` so asked. By "mosaic" alone.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs, "triton" for Ampere and newer.
        interpret: JAX's parameters of interpretation, to try a kernel on a CPU; False compiles it.
    Returns:
        [D, N, H] in the type of `q`; 0 where a query sees nothing.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: a kernel reads the pages from low to high once, 4 H K bytes a key in bfloat16; with a
        layout, for each kv head those that one of its queries sees. A mask adds 2 K bytes a key,
        and in the kernel one comparison for each logit.
    """
    _check_shapes(q, k_pages, v_pages, block_table)
    if mask is not None:
        num_keys = block_table.shape[1] * k_pages.shape[1]
        is_fit = mask.ndim == 2 and len(q) % len(mask) == 0 and mask.shape[1] == num_keys
        expected = f"[R, {num_keys}] with D = {len(q)} a multiple of R"
        require(is_fit, "paged_attention", f"mask {mask.shape}", expected)
    reason = refusal(implementation, q, k_pages, layout)
    check_backend("paged_attention", implementation, BACKENDS, reason)
    check_invariant("paged_attention", implementation, is_invariant)
    is_known = not is_invariant or layout is None
    require(is_known, "paged_attention", "is_invariant with a layout", "one of them")
    settings = dict(scale=scale, softcap=softcap, layout=layout)
    arrays = (q, k_pages, v_pages, block_table, low, high)
    if implementation == "reference":
        return reference.paged_attention(*arrays, scales, mask, **settings)
    if implementation == "triton":
        # Triton is optional, so it is imported where it is used.
        from jaxscale.kernels.paged_attention import triton

        return triton.paged_attention(*arrays, mask, **settings, interpret=interpret)
    settings["is_invariant"] = is_invariant
    return pallas.paged_attention(*arrays, scales, mask, **settings, interpret=interpret)


def write_and_attend(
    q: Array,
    new: tuple[Array, Array],
    pages: tuple[Array, Array],
    block_table: Array,
    low: Array,
    high: Array,
    *,
    scale: float,
    softcap: float | None = None,
    layout: BlockLayout | None = None,
    implementation: str,
    interpret: Any = False,
) -> tuple[Array, tuple[Array, Array]]:
    """As `paged_attention`, of pages into which the kernel puts each sequence's newest key first.

    It is worth it for a few sequences, whose keys would take a kernel of their own to be written.

    Args:
        new: keys and values of the position high - 1, [D, K, H] each, of the pages' type.
        pages: of keys and of values, [pages, page size, K, H] each.
        q, block_table, low, high, scale, softcap, layout, interpret: as `paged_attention`; of a
            sequence with high <= low nothing is written.
        implementation: "reference" or "mosaic", which is for Hopper GPUs.
    Returns:
        ([D, N, H], the pages, in the memory of the given ones where a program may reuse it).
    Raises:
        ValueError: as `paged_attention`.
    """
    _check_shapes(q, *pages, block_table)
    reason = writing_refusal(implementation, q, pages[0], layout)
    check_backend("write_and_attend", implementation, WRITING_BACKENDS, reason)
    settings = dict(scale=scale, softcap=softcap, layout=layout)
    arrays = (q, new, pages, block_table, low, high)
    if implementation == "reference":
        return reference.write_and_attend(*arrays, **settings)
    return pallas.write_and_attend(*arrays, **settings, interpret=interpret)


def ragged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    pages: Array,
    sequences: Sequences,
    scales: tuple[Array, Array] | None = None,
    *,
    num_single: int,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    layout: BlockLayout | None = None,
    implementation: str,
    interpret: Any = False,
) -> Array:
    """Causal attention of a flat row of new tokens, each over its sequence's pages, in one launch.

    Sequence r has the tokens first_token[r] <= t < first_token[r] + num_tokens[r], of which the
    first stands at position[r]; key s of it lies in page pages[first_page[r] + s // page size].

    Source: as `paged_attention`.
    Args:
        q: [T, N, H].
        k_pages, v_pages: [pages, page size, K, H]; query head n reads kv head n // (N / K).
        pages: [M] int32, the pages of all sequences.
        sequences: [R] int32 each. One of padding has no tokens, and a token at a negative position
            sees no key and gets 0.
        scales: as `paged_attention`.
        num_single: the first sequences, which have one token at most.
        window: keys that a token sees, its own included; None for all up to it.
        scale, softcap, interpret: as `paged_attention`.
        layout: which blocks of keys each head of a token sees; None for all.
        implementation: "reference" or "mosaic", which is for Hopper GPUs.
    Returns:
        [T, N, H] in the type of `q`; anything where a token is of no sequence.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    Cost: "mosaic" reads the pages of single tokens once, and of others once for each tile of
        64 K / N tokens, most of them from the L2 cache; with a layout those that one of the tile's
        rows sees.
    """
    _check_pages(q, k_pages, v_pages)
    reason = ragged_refusal(implementation, q, k_pages, layout)
    check_backend("ragged_attention", implementation, RAGGED_BACKENDS, reason)
    settings = dict(num_single=num_single, window=window)
    settings |= dict(scale=scale, softcap=softcap, layout=layout)
    arrays = (q, k_pages, v_pages, pages, sequences, scales)
    if implementation == "reference":
        return reference.ragged_attention(*arrays, **settings)
    return ragged.ragged_attention(*arrays, **settings, interpret=interpret)


def _check_shapes(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
) -> None:
    _check_pages(q, k_pages, v_pages)
    given = f"block_table {block_table.shape}"
    require(block_table.shape[0] == len(q), "paged_attention", given, f"[D, P] with D = {len(q)}")


def _check_pages(q: Array, k_pages: Array, v_pages: Array) -> None:
    _, num_heads, head_dim = q.shape
    is_same = k_pages.shape == v_pages.shape and k_pages.dtype == v_pages.dtype
    given = f"k_pages {k_pages.dtype}{k_pages.shape} and v_pages {v_pages.dtype}{v_pages.shape}"
    expected = f"both [pages, page size, K, H] of one type, with H = {head_dim}"
    require(is_same and k_pages.shape[3] == head_dim, "paged_attention", given, expected)
    kv_heads = k_pages.shape[2]
    given = f"N = {num_heads} and K = {kv_heads}"
    require(num_heads % kv_heads == 0, "paged_attention", given, "N % K == 0")


def writing_refusal(
    implementation: str,
    q: Array,
    k_pages: Array,
    layout: BlockLayout | None = None,
) -> str | None:
    """As `refusal`, for `write_and_attend`."""
    if implementation == "reference":
        return None
    if reason := refusal(implementation, q, k_pages, layout):
        return reason
    if k_pages.dtype != q.dtype:
        return f"pages in {q.dtype}, here {k_pages.dtype}"
    row_bytes = q.shape[2] * q.dtype.itemsize
    if row_bytes % WARPGROUP:
        return f"a head's row in multiples of {WARPGROUP} bytes, here {row_bytes}"
    num_heads, unit = q.shape[1], pallas.UNIT
    groups = num_heads // k_pages.shape[2]
    if num_heads % unit or (unit % groups and groups % unit) or k_pages.shape[2] % (unit // 2):
        expected = f"N % {unit} == 0, K % {unit // 2} == 0, and N / K that divides {unit}"
        return f"{expected}, here {num_heads} and {k_pages.shape[2]}"
    return None


def ragged_refusal(
    implementation: str,
    q: Array,
    k_pages: Array,
    layout: BlockLayout | None = None,
) -> str | None:
    """As `refusal`, for `ragged_attention`."""
    if implementation == "reference":
        return None
    if reason := refusal(implementation, q, k_pages, layout):
        return reason
    if len(q) % ragged.UNIT:
        return f"T % {ragged.UNIT} == 0, here {len(q)}"
    groups = q.shape[1] // k_pages.shape[2]
    if groups > ragged.MAX_GROUPS:
        return f"N / K <= {ragged.MAX_GROUPS}, here {groups}"
    return None


def refusal(
    implementation: str,
    q: Array,
    k_pages: Array,
    layout: BlockLayout | None = None,
) -> str | None:
    """What a kernel would need to compute the request, as the text of an error.

    None when it can, and for what is no kernel. Shapes and types are enough.
    """
    if implementation == "reference":
        return None
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    is_narrow = k_pages.dtype in NARROW_TYPES
    if is_narrow and (implementation != "mosaic" or q.shape[2] % 128):
        given = f"{implementation} and {q.shape[2]}"
        return f"mosaic and head_dim % 128 == 0 for pages in {k_pages.dtype}, here {given}"
    if not is_half or (k_pages.dtype != q.dtype and not is_narrow):
        return f"q and pages both bfloat16 or both float16, here {q.dtype} and {k_pages.dtype}"
    head_dims = HEAD_DIMS[implementation]
    if q.shape[2] not in head_dims:
        return f"head_dim one of {head_dims}, here {q.shape[2]}"
    page_sizes = PAGE_SIZES[implementation]
    if k_pages.shape[1] not in page_sizes:
        return f"a page size of {page_sizes}, here {k_pages.shape[1]}"
    if layout is not None and implementation == "mosaic" and k_pages.shape[1] != BLOCK:
        return f"a page size of {BLOCK} for a layout of blocks, here {k_pages.shape[1]}"
    if q.shape[1] // k_pages.shape[2] > pallas.MAX_GROUPS:
        return f"N / K <= {pallas.MAX_GROUPS}, here {q.shape[1]} / {k_pages.shape[2]}"
    if implementation == "triton":
        return missing()
    if jax.__version_info__ < (0, 11):
        return f"jax >= 0.11, but this is {jax.__version__}"
    return None
