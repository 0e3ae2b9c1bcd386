"""The paged key-value cache of a layer, and which tokens of a flat row belong to whom."""

import dataclasses
import functools

import jax

from jaxscale.ops.attention import pages
from jaxscale.ops.attention.pages import Pages
from jaxscale.types import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer in pages that any sequence may hold.

    Args:
        k: [pages, S of a page, K, H]. Slots before heads: what a token writes lies together.
        v: as `k`.
    """

    k: Pages
    v: Pages


def empty_pages(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
) -> PagedCache:
    """Pages that hold nothing yet, in the compute type or one of `pages.LARGEST`."""
    shape = num_pages, page_size, num_kv_heads, head_dim
    return PagedCache(pages.empty(shape, dtype), pages.empty(shape, dtype))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "slot_mapping",
        "block_table",
        "segments",
        "prompt_pages",
        "page_segments",
        "first_pages",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RaggedRows:
    """Which tokens of a flat row belong to which sequence.

    The first tokens are one each of decoding sequences, at most D. Those behind them are pieces of
    prompts. The pages of all prompts, from each one's first page to that of its last token here,
    are listed one prompt after the other, and read once for all of its tokens.

    Args:
        slot_mapping: [T] int32, the slot of the cache that each token writes: page * page size +
            place in the page. Padding writes to a page that nobody reads.
        block_table: [D, P] int32, the pages of each decoding sequence in order.
        segments: [T] int32, the prompt of a token, counted from 1; 0 for a token of a decoding
            sequence and for padding.
        prompt_pages: [C] int32, the pages of all prompts; none in a step without prompts.
        page_segments: [C] int32, the prompt that each of them is of; 0 for padding.
        first_pages: [prompts + 1] int32, where in `prompt_pages` a prompt begins; the first is not
            used.
    """

    slot_mapping: Array
    block_table: Array
    segments: Array
    prompt_pages: Array
    page_segments: Array
    first_pages: Array
