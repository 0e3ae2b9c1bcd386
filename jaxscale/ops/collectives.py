"""What a mesh injects where devices exchange something; on one device each is the identity.

The residual stream belongs to the devices of a tensor group by tokens: between
`reduce_scatter_tokens` and `gather_tokens` each device has its own tokens only. So every token's
loss is counted on exactly one device, and a parameter's gradient is the sum over all devices that
hold it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from jaxscale.types import Array


class GatherParameters(Protocol):
    """ZeRO-3: shards of a section's parameters to whole ones."""

    def __call__(self, section: str, params: Any) -> Any:
        """`params` of a section such as "layers/0" or "head", as a forward uses them."""


class ColumnThenRow(Protocol):
    """Column-parallel matmuls, what lies between, and a row-parallel matmul, with both exchanges.

    A mesh may run some rows after the others, so that exchanges overlap with matmuls.
    """

    def __call__(
        self, column: Callable, row: Callable, x: Array, *by_token: Any
    ) -> tuple[Array, Any]:
        """Gathers tokens, calls `column` and `row`, and scatters the sums.

        Args:
            column: (x [b, T, D], *by_token) -> (hidden, kept). It treats rows alike: of some of the
                rows it returns those rows of what it returns for all.
            row: hidden -> partial sums [b, T, D].
            x: [B, own T, D].
            by_token: trees of [B, T, ...], known to the whole tensor group.
        Returns:
            (own tokens' sums [B, own T, D], what `column` kept).
        """


def _identity(x: Any) -> Any:
    return x


def _stored(section: str, params: Any) -> Any:
    return params


def _column_then_row(
    column: Callable, row: Callable, x: Array, *by_token: Any
) -> tuple[Array, Any]:
    hidden, kept = column(x, *by_token)
    return row(hidden), kept


def _first_column(num_columns: int) -> int:
    return 0


def _kv_heads(weights: Array, axis: int, num_kv_heads: int) -> Array:
    return weights


def _own_heads(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return q, k, v


def _own_chunk(o: Array, num_heads: int) -> Array:
    return o


def _is_counted() -> float:
    return 1.0


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The exchanges of a model; the defaults are those of one device.

    Args:
        gather_parameters: see `GatherParameters`.
        gather_tokens: residual [B, own T, D] -> [B, T, D], the input of column-parallel matmuls.
        reduce_scatter_tokens: partial sums [B, T, D] of row-parallel matmuls -> [B, own T, D].
        column_then_row: see `ColumnThenRow`.
        whole_rows: [B, T] -> the tokens of the same rows on all devices, in any order.
        own_tokens: [B, T, ...] known to the whole tensor group -> [B, own T, ...]. The own tokens
            are a share of all B T tokens in the order of rows, so its rows are not the batch's:
            only what treats tokens alike may read it.
        first_column: (number of local columns of a matrix) -> number of the first of them.
        kv_heads: (weights whose dim `axis` counts kv heads, axis, number of the model's kv heads)
            -> those of the kv heads that the local query heads read.
        sum_over_heads: sums over the heads of a token that other devices have; differentiable.
        sum_over_tokens: sums over the tokens of all devices a figure that is not differentiated.
        sum_over_rows: sums over the devices that have tokens of the same rows; differentiable. What
            is made of such a sum is known to all of them, so it counts on one: see `is_counted`.
        heads_by_member: (q [B, c, N, H], k and v [B, c, K, H]) of this device's tokens of a chunk
            -> each as `to_heads` sends it, [U, c, B, heads / U, H] for U devices, else as it was.
        to_heads: (q, k, v, by member) -> those of all the chunk's tokens in their order, [B, C,
            ...], of a share of the heads; linear.
        to_tokens: (o [B, C, N', H] of a share of the heads, N) -> o [B, c, N, H], the way back.
        whole_chunk: [B, c] of this device's tokens of a chunk -> [B, C] of all of them in order.
        is_counted: () -> 1 on one of the devices that have tokens of the same rows, 0 on the
            others.
    """

    gather_parameters: GatherParameters = _stored
    gather_tokens: Callable[[Array], Array] = _identity
    reduce_scatter_tokens: Callable[[Array], Array] = _identity
    column_then_row: ColumnThenRow = _column_then_row
    whole_rows: Callable[[Array], Array] = _identity
    own_tokens: Callable[[Array], Array] = _identity
    first_column: Callable[[int], Array | int] = _first_column
    kv_heads: Callable[[Array, int, int], Array] = _kv_heads
    sum_over_heads: Callable[[Array], Array] = _identity
    sum_over_tokens: Callable[[Array], Array] = _identity
    sum_over_rows: Callable[[Array], Array] = _identity
    heads_by_member: Callable[[Array, Array, Array], tuple[Array, Array, Array]] = _own_heads
    to_heads: Callable[[Array, Array, Array], tuple[Array, Array, Array]] = _own_heads
    to_tokens: Callable[[Array, int], Array] = _own_chunk
    whole_chunk: Callable[[Array], Array] = _identity
    is_counted: Callable[[], Array | float] = _is_counted
