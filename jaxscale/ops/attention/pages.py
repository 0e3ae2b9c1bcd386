"""Pages of keys or values, in the compute type or in 8 bits with a scale a token and head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxscale.ops.precision import accumulator
from jaxscale.types import Array

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the types of 8 bits


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class QuantisedPages:
    """Numbers of 8 bits, of which those of a token and head share a scale.

    Source: Liu et al. 2024, KIVI (arXiv 2402.02750), section 3.1, its quantisation a token.
    Args:
        values: [pages, S of a page, K, H], int8 or float8_e4m3fn.
        scales: [pages, 1, K, S of a page] bfloat16. Slots come last, so that the scales of a page
            and head lie together, and heads stand where `values` has them, so that a mesh cuts both
            alike.
    """

    values: Array
    scales: Array


Pages = Array | QuantisedPages


def empty(shape: tuple[int, int, int, int], dtype: str) -> Pages:
    """Pages that hold nothing yet; `dtype` is that of the compute or one of `LARGEST`."""
    values = jnp.zeros(shape, dtype)
    if dtype not in LARGEST:
        return values
    num_pages, size, num_kv_heads, _ = shape
    return QuantisedPages(values, jnp.zeros((num_pages, 1, num_kv_heads, size), jnp.bfloat16))


def parts(pages: Pages) -> tuple[Array, Array | None]:
    """(values, scales); None for pages in the compute type."""
    return (pages.values, pages.scales) if isinstance(pages, QuantisedPages) else (pages, None)


def page_size(pages: Pages) -> int:
    """Tokens a page."""
    return parts(pages)[0].shape[1]


def written(pages: Pages, x: Array, slots: Array) -> Pages:
    """Pages with x [T, K, H] in its slots [T]; in place where the pages are donated."""
    if not isinstance(pages, QuantisedPages):
        return _put(pages, x.astype(pages.dtype), slots)
    values, scales = quantise(x, str(pages.values.dtype))
    size = page_size(pages)
    here = pages.scales.at[slots // size, 0, :, slots % size]
    return QuantisedPages(
        values=_put(pages.values, values, slots),
        scales=here.set(scales, unique_indices=True),
    )


def _put(pages: Array, x: Array, slots: Array) -> Array:
    """`pages` with x in its slots.

    XLA is told that each slot is written once, so that it need not order the writes. Only padding
    shares a slot, which nobody reads.
    """
    flat = pages.reshape(-1, *pages.shape[2:])
    flat = flat.at[slots].set(x, unique_indices=True)
    return flat.reshape(pages.shape)


def read(pages: Pages, numbers: Array, dtype: jnp.dtype) -> Array:
    """The pages of these numbers [...]: [..., S of a page, K, H] in a type."""
    if not isinstance(pages, QuantisedPages):
        return pages[numbers].astype(dtype)
    values = pages.values[numbers].astype(dtype)
    scales = jnp.swapaxes(pages.scales[numbers], -1, -3)  # [..., S of a page, K, 1]
    return values * scales.astype(dtype)


def quantise(x: Array, dtype: str) -> tuple[Array, Array]:
    """(values [..., H] of 8 bits, scales [...] bfloat16) of x [..., H]."""
    wide = accumulator(x)
    largest = LARGEST[dtype]
    scales = jnp.abs(wide).max(-1) / largest
    scales = scales.astype(jnp.bfloat16)
    # The scale is rounded first, so that the values fit the scale that is kept.
    divisor = jnp.where(scales == 0, 1, scales)
    divisor = divisor.astype(wide.dtype)
    scaled = wide / divisor[..., None]
    scaled = jnp.clip(scaled, -largest, largest)
    if dtype == "int8":
        scaled = jnp.round(scaled)
    return scaled.astype(dtype), scales
