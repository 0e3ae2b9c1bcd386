"""The way of tokens to their experts and back.

Tokens become rows sorted by expert, and each token gets the gated sum of what comes of its rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxscale.ops.precision import accumulator
from jaxscale.types import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["order", "inverse", "group_sizes"],
    meta_fields=["num_active", "is_partial"],
)
@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Where the choices of n tokens stand once they are sorted by expert.

    A choice is one expert of one token.

    Source: Gale et al. 2022, MegaBlocks (arXiv 2211.15841), section 5.2: its permutation, without
        padding.
    Args:
        order: [rows] the choice in each row.
        inverse: [n A] the row of each choice.
        group_sizes: [E] rows of each expert; choices of no expert, numbered E or more, come last.
        num_active: A, the number of experts of a token.
        is_partial: whether there are choices of no expert. Their outputs count as zero, whatever is
            in their rows, and rows may be fewer than choices.
    """

    order: Array
    inverse: Array
    group_sizes: Array
    num_active: int
    is_partial: bool = False

    def rows(self, x: Array) -> Array:
        """The tokens [n, D] once for each choice, sorted: [rows, D]."""
        return _spread(x, self)

    def keys(self, keys: Array) -> Array:
        """What each choice has, such as random keys [..., A, 2], sorted: [rows, 2]."""
        return keys.reshape(-1, keys.shape[-1])[self.order]

    def combine(
        self,
        outputs: Array,
        gates: Array,
        slopes: Array | None = None,
    ) -> Array:
        """Each token's sum over its choices of output times gate.

        Args:
            outputs: [rows, D], sorted.
            gates: [n, A].
            slopes: [n, A] factors of the gradient of `outputs`, which have no gradient themselves;
                None for the gates.
        Returns:
            [n, D].
        """
        slopes = gates if slopes is None else slopes
        return _combine(outputs, gates, slopes, self)


def make_dispatch(index: Array, num_experts: int, num_rows: int | None = None) -> Dispatch:
    """Sorts the choices index [n, A]; those of one expert stay in the order of their tokens.

    Args:
        index: [n, A].
        num_experts: E.
        num_rows: of the rows, where some choices are of no expert; not fewer than those that are
            of one. None where all are.
    """
    choices = index.reshape(-1)
    order = jnp.argsort(choices, stable=True)
    zeros = jnp.zeros_like(order)
    row = jnp.arange(order.size, dtype=order.dtype)
    inverse = zeros.at[order].set(row, unique_indices=True)
    group_sizes = jnp.bincount(choices, length=num_experts).astype(jnp.int32)
    is_partial = num_rows is not None
    return Dispatch(order[:num_rows], inverse, group_sizes, index.shape[-1], is_partial)


@jax.custom_vjp
def _spread(x: Array, dispatch: Dispatch) -> Array:
    """Its gradient gathers and sums, where that of plain indexing would scatter and add."""
    return x[dispatch.order // dispatch.num_active]


def _spread_forward(x: Array, dispatch: Dispatch) -> tuple[Array, Dispatch]:
    return _spread(x, dispatch), dispatch


def _spread_backward(dispatch: Dispatch, cotangent: Array) -> tuple[Array, None]:
    return _by_token(cotangent, dispatch).sum(1), None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _combine(
    outputs: Array,
    gates: Array,
    slopes: Array,
    dispatch: Dispatch,
) -> Array:
    by_token = accumulator(_by_token(outputs, dispatch))
    weighted = by_token * accumulator(gates)[..., None]
    return weighted.sum(1).astype(outputs.dtype)


def _combine_forward(*arguments: Array | Dispatch) -> tuple[Array, tuple]:
    return _combine(*arguments), arguments


def _combine_backward(
    residuals: tuple[Array, Array, Array, Dispatch],
    cotangent: Array,
) -> tuple:
    outputs, gates, slopes, dispatch = residuals
    # Compute both gradients in the order of the rows, in which `outputs` lie: then only the
    # cotangent is gathered, once for both.
    cotangent = accumulator(_spread(cotangent, dispatch))
    slope_of_row = accumulator(slopes).reshape(-1)[dispatch.order]
    doutputs = cotangent * slope_of_row[:, None]
    dgate_of_row = (accumulator(outputs) * cotangent).sum(-1)
    dgates = _by_choice(dgate_of_row, dispatch).reshape(gates.shape)
    return doutputs.astype(outputs.dtype), dgates.astype(gates.dtype), None, None


_combine.defvjp(_combine_forward, _combine_backward)


def _by_token(rows: Array, dispatch: Dispatch) -> Array:
    """Sorted rows [rows, D] to [n, A, D]."""
    by_choice = _by_choice(rows, dispatch)
    return by_choice.reshape(-1, dispatch.num_active, rows.shape[-1])


def _by_choice(rows: Array, dispatch: Dispatch) -> Array:
    """Sorted rows [rows, ...] to [n A, ...], with zeros for choices of no expert."""
    if not dispatch.is_partial:
        return rows[dispatch.inverse]
    is_used = dispatch.inverse < dispatch.group_sizes.sum()
    # One row for all that are not used, so that little memory is read for them.
    found = rows[jnp.where(is_used, dispatch.inverse, 0)]
    return jnp.where(is_used.reshape(-1, *[1] * (rows.ndim - 1)), found, 0)
