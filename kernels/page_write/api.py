"""New keys and values of tokens put into the pages of a cache, in place."""

import math
from typing import Any

import jax
from jax import Array

from jaxscale.kernels.checks import check_backend, require
from jaxscale.kernels.page_write import pallas, reference

BACKENDS = ("reference", "mosaic")
ROW_BYTES = 16  # whose multiples the hardware copies


def page_write(
    pages: tuple[Array, Array],
    new: tuple[Array, Array],
    slots: Array,
    *,
    implementation: str,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Pages of keys and of values with the new ones in their slots.

    Source: Kwon et al. 2023, PagedAttention (arXiv 2309.06180), section 5.1, its fused write.
    Args:
        pages: of keys and of values, [pages, page size, K, H] each.
        new: keys and values of the tokens, [T, K, H] each, of the pages' type.
        slots: [T] int32, page * page size + place in the page. Where two tokens share a slot,
            either may be found there afterwards.
        implementation: one of BACKENDS; "mosaic" is for Hopper GPUs.
        interpret: JAX's parameters of interpretation, to try a kernel on a CPU; False compiles it.
    Returns:
        The pages, in the memory of the given ones where a program may reuse it.
    Raises:
        ValueError: shapes do not fit one another, or the backend cannot do what is asked.
    """
    shape, (k, v) = pages[0].shape, new
    is_fit = pages[1].shape == shape and k.shape == v.shape == (len(slots), *shape[2:])
    given = f"pages {shape} and {pages[1].shape}, new {k.shape} and {v.shape}"
    require(is_fit, "page_write", given, "[pages, page size, K, H] and [T, K, H], twice")
    given = f"pages in {pages[0].dtype} and {pages[1].dtype}, new in {k.dtype} and {v.dtype}"
    is_same = {each.dtype for each in (*pages, *new)} == {k.dtype}
    require(is_same, "page_write", given, "one type")
    check_backend("page_write", implementation, BACKENDS, refusal(implementation, pages[0]))
    if implementation == "reference":
        return reference.page_write(pages, new, slots)
    return pallas.page_write(pages, new, slots, interpret=interpret)


def refusal(implementation: str, pages: Array) -> str | None:
    """What a kernel would need to compute the request, as the text of an error.

    None when it can, and for what is no kernel. Shapes and types are enough.
    """
    if implementation == "reference":
        return None
    row_bytes = pages.shape[3] * pages.dtype.itemsize
    if row_bytes % ROW_BYTES:
        return f"a head's row in multiples of {ROW_BYTES} bytes, here {row_bytes}"
    token_bytes = math.prod(pages.shape[2:]) * pages.dtype.itemsize
    if token_bytes > pallas.MOST_BYTES:
        return f"at most {pallas.MOST_BYTES} bytes a token, here {token_bytes}"
    if jax.__version_info__ < (0, 11):
        return f"jax >= 0.11, but this is {jax.__version__}"
    return None
