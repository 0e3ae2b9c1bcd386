"""The way of tokens to their experts and back: rows sorted by expert, and the gated sum of what comes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxscale.ops.precision import accumulator
from jaxscale.types import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["order", "inverse", "group_sizes"],
    meta_fields=["num_active"],
)
@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Where the choices of n tokens stand once they are sorted by expert.

    Source: Gale et al. 2022, MegaBlocks (arXiv 2211.15841), section 5.2: its permutation, without
        padding.
    Args:
        order: [n A] the choice in each row.
        inverse: [n A] the row of each choice.
        group_sizes: [E] rows of each expert; choices of no expert, numbered E or more, come last.
        num_active: A.
    """

    order: Array
    inverse: Array
    group_sizes: Array
    num_active: int

    def rows(self, x: Array) -> Array:
        """The tokens [n, D] once for each choice, sorted: [n A, D]."""
        return _spread(x, self)

    def keys(self, keys: Array) -> Array:
        """What each choice has of its own, such as keys [..., A, 2], sorted: [n A, 2]."""
        return keys.reshape(-1, keys.shape[-1])[self.order]

    def combine(self, outputs: Array, gates: Array, slopes: Array | None = None) -> Array:
        """The sum over each token's choices of the sorted outputs [n A, D] times gates [n, A]: [n, D].

        The gradient of `outputs` is multiplied by `slopes` [n, A], which have none themselves; None
        for the gates.
        """
        return _combine(outputs, gates, gates if slopes is None else slopes, self)


def make_dispatch(index: Array, num_experts: int) -> Dispatch:
    """Sorts the choices index [n, A], those of one expert in the order of their tokens."""
    choices = index.reshape(-1)
    order = jnp.argsort(choices, stable=True)
    inverse = (
        jnp.zeros_like(order)
        .at[order]
        .set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    )
    group_sizes = jnp.bincount(choices, length=num_experts).astype(jnp.int32)
    return Dispatch(order, inverse, group_sizes, index.shape[-1])


@jax.custom_vjp
def _spread(x: Array, dispatch: Dispatch) -> Array:
    """Its gradient gathers and sums, where that of plain indexing would scatter and add."""
    return x[dispatch.order // dispatch.num_active]


def _spread_backward(dispatch: Dispatch, cotangent: Array) -> tuple[Array, None]:
    return _by_token(cotangent, dispatch).sum(1), None


_spread.defvjp(lambda x, dispatch: (_spread(x, dispatch), dispatch), _spread_backward)


@jax.custom_vjp
def _combine(outputs: Array, gates: Array, slopes: Array, dispatch: Dispatch) -> Array:
    weighted = accumulator(_by_token(outputs, dispatch)) * accumulator(gates)[..., None]
    return weighted.sum(1).astype(outputs.dtype)


def _combine_backward(arguments: tuple[Array, Array, Array, Dispatch], cotangent: Array) -> tuple:
    """Both gradients in the order of the rows, where `outputs` lie: only the cotangent is gathered, once for both."""
    outputs, gates, slopes, dispatch = arguments
    cotangent = accumulator(_spread(cotangent, dispatch))
    doutputs = cotangent * accumulator(slopes).reshape(-1)[dispatch.order][:, None]
    dgates = (accumulator(outputs) * cotangent).sum(-1)[dispatch.inverse].reshape(gates.shape)
    return doutputs.astype(outputs.dtype), dgates.astype(gates.dtype), None, None


_combine.defvjp(lambda *arguments: (_combine(*arguments), arguments), _combine_backward)


def _by_token(rows: Array, dispatch: Dispatch) -> Array:
    """Sorted rows [n A, D] to [n, A, D]."""
    return rows[dispatch.inverse].reshape(-1, dispatch.num_active, rows.shape[-1])
