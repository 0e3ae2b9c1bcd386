"""Pages of keys or values, in the compute type or in 8 bits with a scale a token and head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxscale.kernels.page_write import api as page_write
from jaxscale.ops.device import kernel_for
from jaxscale.ops.precision import accumulator
from jaxscale.types import Array

# Of fewer new tokens XLA's scatters, which rotate the keys too, take less time than a kernel to
# which they are handed.
LEAST_TOKENS = 1024
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


def written(
    kept: tuple[Pages, Pages],
    new: tuple[Array, Array],
    slots: Array,
) -> tuple[Pages, Pages]:
    """Pages of keys and of values with the new ones [T, K, H] in their slots [T].

    In place where the pages are donated. Only padding shares a slot, which nobody reads.
    """
    if not isinstance(kept[0], QuantisedPages):
        return _put(kept, tuple(x.astype(kept[0].dtype) for x in new), slots)
    narrow = [quantise(x, str(kept[0].values.dtype)) for x in new]
    values = _put(tuple(each.values for each in kept), tuple(x for x, _ in narrow), slots)
    size = page_size(kept[0])
    scales = [
        each.scales.at[slots // size, 0, :, slots % size].set(of_tokens, unique_indices=True)
        for each, (_, of_tokens) in zip(kept, narrow, strict=True)
    ]
    k, v = map(QuantisedPages, values, scales)
    return k, v


def _put(
    kept: tuple[Array, Array],
    new: tuple[Array, Array],
    slots: Array,
) -> tuple[Array, Array]:
    family = kernel_for(page_write, kept[0]) if len(slots) >= LEAST_TOKENS else None
    return page_write.page_write(kept, new, slots, implementation=family or "reference")


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
