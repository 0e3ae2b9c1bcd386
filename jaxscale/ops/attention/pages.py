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
        scales: [pages, S of a page, K] bfloat16.
    """

    values: Array
    scales: Array


Pages = Array | QuantisedPages


def empty(shape: tuple[int, int, int, int], dtype: str) -> Pages:
    """Pages that hold nothing yet; `dtype` is that of the compute or one of `LARGEST`."""
    values = jnp.zeros(shape, dtype)
    if dtype not in LARGEST:
        return values
    return QuantisedPages(values, jnp.zeros(shape[:3], jnp.bfloat16))


def page_size(pages: Pages) -> int:
    """Tokens a page."""
    values = pages.values if isinstance(pages, QuantisedPages) else pages
    return values.shape[1]


def written(pages: Pages, x: Array, slots: Array) -> Pages:
    """Pages with x [T, K, H] in its slots [T]; in place where the pages are donated."""
    if not isinstance(pages, QuantisedPages):
        return _put(pages, x.astype(pages.dtype), slots)
    values, scales = quantise(x, str(pages.values.dtype))
    return QuantisedPages(
        values=_put(pages.values, values, slots),
        scales=_put(pages.scales, scales, slots),
    )


def _put(pages: Array, x: Array, slots: Array) -> Array:
    """Only padding shares a slot, which nobody reads.

    To be told that a slot is written once spares XLA atomic writes, which took six times as long on
    an H200.
    """
    flat = pages.reshape(-1, *pages.shape[2:])
    flat = flat.at[slots].set(x, unique_indices=True)
    return flat.reshape(pages.shape)


def read(pages: Pages, numbers: Array, dtype: jnp.dtype) -> Array:
    """The pages of these numbers [...]: [..., S of a page, K, H] in a type."""
    if not isinstance(pages, QuantisedPages):
        return pages[numbers].astype(dtype)
    values = pages.values[numbers].astype(dtype)
    scales = pages.scales[numbers].astype(dtype)
    return values * scales[..., None]


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
