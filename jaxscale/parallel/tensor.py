"""Tensor parallelism with sequence-sharded norms, as operations injected into a single-device model.

Inside the manual region the residual is [B, T / tensor, D]: each token lives on one device, which
has a share of the B T tokens in the order of rows, so that what is exchanged lies together in
memory and nothing is transposed. Every collective here has its transpose here (all-gather and
reduce-scatter, a permute there and one back); a bare psum would have a wrong gradient. `gather_tokens` and
`reduce_scatter_tokens` of a single device exchange nothing at all: XLA removes such an exchange only after it has
kept a matmul from taking in the addition that follows.

Source: Shoeybi et al. 2019 (arXiv 1909.08053), section 3; Korthikanti et al. 2022 (arXiv
    2205.05198), section 4.2.2.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxscale.ops import loss
from jaxscale.ops.backends import EXCHANGED
from jaxscale.ops.loss import Head
from jaxscale.ops.precision import accumulator
from jaxscale.parallel.mesh import AXES, PIPELINE, SEQUENCE, TENSOR
from jaxscale.types import Array, InputError


def gather_tokens(x: Array) -> Array:
    """Residual [B, T / tensor, D] to [B, T, D]."""
    num_members = lax.axis_size(TENSOR)
    if num_members == 1:
        return x
    num_rows, num_own, dim = x.shape
    whole = lax.all_gather(x.reshape(-1, dim), TENSOR, tiled=True)
    return whole.reshape(num_rows, num_own * num_members, dim)


def reduce_scatter_tokens(y: Array) -> Array:
    """Partial sums [B, T, D] to the residual [B, T / tensor, D]."""
    num_members = lax.axis_size(TENSOR)
    if num_members == 1:
        return y
    num_rows, length, dim = y.shape
    own = lax.psum_scatter(y.reshape(-1, dim), TENSOR, tiled=True)
    return checkpoint_name(own.reshape(num_rows, length // num_members, dim), EXCHANGED)


def column_then_row(f: Callable, project: Callable, x: Array, *rows: Any) -> tuple[Array, Any]:
    """`ColumnThenRow` of all rows at once, all exchanged before and all after."""
    hidden, kept = f(gather_tokens(x), *rows)
    return reduce_scatter_tokens(project(hidden)), kept


def column_then_row_by_member(
    f: Callable, project: Callable, x: Array, *rows: Any
) -> tuple[Array, Any]:
    """`ColumnThenRow`, one member's rows after the other: exchanges run beside the matmuls of other rows.

    A member's rows arrive while `f` has those of the one before, and their sums leave while it has
    the next one's; the own rows come first and are projected last. The same in the backward. Own
    tokens are whole rows if the group divides B; else this is `column_then_row`. Permutes, because each can
    be waited for alone. Not for a branch that some pipeline stages
    do not take: on CPUs a permute there is wrong.

    Source: Wang et al. 2023 (ASPLOS, doi 10.1145/3567955.3567959), section 4; here no ring, each
        exchange is direct.
    Cost: P times as many matmuls, of B / P rows, and P parts of each weight's gradient, added in
        its type.
    Raises:
        InputError: `f` keeps something, as serving does a cache, whose rows would be cut.
    """
    num_members, num_rows = lax.axis_size(TENSOR), len(x)
    if num_members == 1 or num_rows % num_members:
        return column_then_row(f, project, x, *rows)
    each = num_rows // num_members
    h, done = x.reshape(each, -1, x.shape[-1]), []
    for distance in range(num_members):
        theirs = _shift(h, -distance)
        if done:  # one after the other, or XLA begins with rows that have yet to arrive
            theirs, done[-1] = lax.optimization_barrier((theirs, done[-1]))
        first = (lax.axis_index(TENSOR) + distance) % num_members * each
        of_member = jax.tree.map(lambda r: lax.dynamic_slice_in_dim(r, first, each), rows)  # noqa: B023
        hidden, kept = f(theirs, *of_member)
        if jax.tree.leaves(kept):
            raise InputError(
                "tensor.by_member",
                "a cache",
                "none, for its rows would be cut: `tensor.whole` keeps one",
            )
        done.append(project(hidden) if distance else hidden)
    done[0], done[-1] = lax.optimization_barrier((done[0], done[-1]))
    received = [_shift(y, distance) for distance, y in enumerate(done[1:], 1)]
    total = sum((accumulator(y) for y in received), accumulator(project(done[0]))).astype(x.dtype)
    return checkpoint_name(total.reshape(x.shape), EXCHANGED), None


def _shift(x: Array, distance: int) -> Array:
    """Every member's `x` to the member `distance` further."""
    num_members = lax.axis_size(TENSOR)
    if distance == 0:
        return x
    return lax.ppermute(x, TENSOR, [(i, (i + distance) % num_members) for i in range(num_members)])


def own_tokens(x: Array) -> Array:
    """[B, T, ...] known to the whole group to this device's tokens [B, T / tensor, ...]."""
    num_rows, length, *rest = x.shape
    num_own = length // lax.axis_size(TENSOR)
    start = lax.axis_index(TENSOR) * num_rows * num_own
    mine = lax.dynamic_slice_in_dim(x.reshape(-1, *rest), start, num_rows * num_own)
    return mine.reshape(num_rows, num_own, *rest)


def first_column(num: int) -> Array:
    """Number of this device's first element of a dim that is cut, of which each device has `num`."""
    return lax.axis_index(TENSOR) * num


def embed(table: Array, tokens: Array) -> Array:
    """Vocabulary-parallel look-up: local table [V / tensor, D], tokens [B, T] to the residual."""
    rows = table.shape[0]
    local = tokens - lax.axis_index(TENSOR) * rows
    is_here = (local >= 0) & (local < rows)
    return reduce_scatter_tokens(
        jnp.where(is_here[..., None], table[jnp.clip(local, 0, rows - 1)], 0)
    )


def token_loss(
    h: Array, head: Array | Head, labels: Array, softcap: float | None = None
) -> tuple[Array, Array]:
    """Vocabulary-parallel `ops.loss.token_loss` of the own tokens; local head [V / tensor, D].

    The maximum only steadies the exponentials and carries no gradient.
    """
    columns = loss.num_rows(head)
    label, part = loss.label_and_normaliser(
        h, head, labels - lax.axis_index(TENSOR) * columns, softcap
    )
    top = lax.pmax(lax.stop_gradient(part), TENSOR)
    total, label = jnp.moveaxis(
        reduce_scatter_tokens(jnp.stack([jnp.exp(part - top), label], -1)), -1, 0
    )
    normaliser = jnp.log(total) + own_tokens(top)
    is_known = own_tokens((labels >= 0) & (labels < columns * lax.axis_size(TENSOR)))
    return jnp.where(is_known, normaliser - label, 0), normaliser


def kv_heads(weights: Array, axis: int, num_kv_heads: int) -> Array:
    """The kv heads that the local query heads read.

    A group with more members than there are kv heads holds all of them on each member, because a
    head cannot be divided. The gradient of a head is then the sum over the members that read it, as
    for every parameter that devices hold together.

    Args:
        weights: dim `axis` counts kv heads, the local ones or all.
        axis: of the kv heads.
        num_kv_heads: K, of the model.
    """
    num_members = lax.axis_size(TENSOR)
    if num_members == 1 or weights.shape[axis] < num_kv_heads:
        return weights
    first = lax.axis_index(TENSOR) * num_kv_heads // num_members
    return lax.dynamic_slice_in_dim(weights, first, 1, axis)


def sum_over_heads(x: Array) -> Array:
    """Sum over the heads that the group's members have.

    Each member uses the sum for its own heads, so that the gradient of a part is the sum over the
    members of the sum's cotangents, which is how psum transposes.
    """
    return lax.psum(x, TENSOR)


def sum_over_rows(x: Array) -> Array:
    """Sum over the devices that have tokens of the same rows.

    All of them know it, so that what is made of it must count on one of them: `is_counted`. Then its
    cotangent is zero on the others, and psum, which transposes to psum, brings it to all.
    """
    return lax.psum(x, (SEQUENCE, TENSOR))


def is_counted() -> Array:
    """1 on one of the devices that have tokens of the same rows, 0 on the others."""
    is_first = (lax.axis_index(SEQUENCE) == 0) & (lax.axis_index(TENSOR) == 0)
    return is_first.astype(jnp.float32)


def sum_over_tokens(x: Array) -> Array:
    """Sum over all tokens: over every device of this pipeline stage; the caller has stopped its gradient."""
    return lax.psum(x, tuple(axis for axis in AXES if axis != PIPELINE))


def replicated_input(x: Array) -> Array:
    """The input of column-parallel matmuls where the residual is replicated over the group."""
    return x


def sum_partial(y: Array) -> Array:
    """Partial sums of row-parallel matmuls to a replicated residual; not differentiated."""
    return lax.psum(y, TENSOR)


def embed_replicated(table: Array, tokens: Array) -> Array:
    """Vocabulary-parallel look-up to a replicated residual: local table [V / tensor, D]."""
    rows = table.shape[0]
    local = tokens - lax.axis_index(TENSOR) * rows
    is_here = (local >= 0) & (local < rows)
    return sum_partial(jnp.where(is_here[..., None], table[jnp.clip(local, 0, rows - 1)], 0))


def logits(h: Array, head: Array | Head, softcap: float | None = None) -> Array:
    """Logits [B, T, V] on every member, of a local head [V / tensor, D]; not differentiated."""
    local = loss.unembed(h, head, softcap)
    return lax.all_gather(local, TENSOR, axis=local.ndim - 1, tiled=True)
