"""The slow twin of writing to pages."""

from jax import Array


def page_write(
    pages: tuple[Array, Array],
    new: tuple[Array, Array],
    slots: Array,
) -> tuple[Array, Array]:
    """As `api.page_write`, by XLA's scatter.

    XLA is told that each slot is written once, so that it need not order the writes.
    """

    def put(kept: Array, x: Array) -> Array:
        flat = kept.reshape(-1, *kept.shape[2:])
        return flat.at[slots].set(x, unique_indices=True).reshape(kept.shape)

    (k_pages, v_pages), (k, v) = pages, new
    return put(k_pages, k), put(v_pages, v)
