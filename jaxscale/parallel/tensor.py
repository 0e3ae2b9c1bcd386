"""Tensor parallelism: the collectives around a single-device model's sharded matmuls.

In training the residual is sequence-sharded. Inside the manual region it is [B, T / tensor, D]:
each token lives on one device. A device's share is taken of all B T tokens in the order of rows,
so that what is exchanged lies together in memory and nothing is transposed. Each of these
collectives has its transpose here (all-gather and reduce-scatter, a permute and the permute back).
A bare psum of what
every member goes on with would have a wrong gradient. In a group of one device `gather_tokens` and
`reduce_scatter_tokens` are the identity: XLA would remove an exchange with itself, but only after
the exchange has kept it from fusing a matmul with the addition that follows.

In serving a step has so few tokens that every member of the tensor group holds the whole residual,
and nothing is differentiated. `sum_partial`, `embed_replicated` and `logits` are the collectives of
that layout.

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
from jaxscale.ops.embedding import look_up
from jaxscale.ops.loss import Head
from jaxscale.ops.precision import accumulator
from jaxscale.parallel.mesh import AXES, PIPELINE, SEQUENCE, TENSOR
from jaxscale.types import Array, InputError


def gather_tokens(x: Array) -> Array:
    """All-gather of the residual [B, T / tensor, D] to [B, T, D] for column-parallel matmuls."""
    num_members = lax.axis_size(TENSOR)
    if num_members == 1:
        return x
    num_rows, num_own, dim = x.shape
    tokens = x.reshape(-1, dim)
    gathered = lax.all_gather(tokens, TENSOR, tiled=True)
    return gathered.reshape(num_rows, num_own * num_members, dim)


def reduce_scatter_tokens(y: Array) -> Array:
    """Reduce-scatter of row-parallel matmuls' partial sums [B, T, D] to [B, T / tensor, D]."""
    num_members = lax.axis_size(TENSOR)
    if num_members == 1:
        return y
    num_rows, length, dim = y.shape
    tokens = y.reshape(-1, dim)
    summed = lax.psum_scatter(tokens, TENSOR, tiled=True)
    residual = summed.reshape(num_rows, length // num_members, dim)
    return checkpoint_name(residual, EXCHANGED)


def column_then_row(
    column: Callable,
    row: Callable,
    x: Array,
    *by_token: Any,
) -> tuple[Array, Any]:
    """Column-parallel matmuls and a row-parallel one, of all rows at once.

    Args:
        column, row, x, by_token: as `ops.collectives.ColumnThenRow`.
    Returns:
        (residual [B, T / tensor, D], what `column` keeps).
    Cost: one all-gather before and one reduce-scatter after, beside which nothing is computed.
    """
    hidden, kept = column(gather_tokens(x), *by_token)
    return reduce_scatter_tokens(row(hidden)), kept


def column_then_row_by_member(
    column: Callable,
    row: Callable,
    x: Array,
    *by_token: Any,
) -> tuple[Array, Any]:
    """`column_then_row` with exchanges that run beside the matmuls of other rows.

    The rows are computed in one group a member: those that lie on this device, then those of the
    next member, and so on. A group's rows arrive while `column` has the group before, and their
    sums leave while `column` has the group after. The rows of this device need no exchange, so they
    come first and are projected last, when there is nothing else to compute. The same holds in the
    backward.

    A device's tokens are whole rows only if the group divides B; else this is `column_then_row`.
    The exchanges are permutes, because each permute can be waited for alone. Do not use it in a
    branch that some pipeline stages do not take: on CPUs a permute there is wrong.

    Source: Wang et al. 2023 (ASPLOS, doi 10.1145/3567955.3567959), section 4; here there is no
        ring, each exchange is direct.
    Args:
        column, row, x, by_token: as `ops.collectives.ColumnThenRow`.
    Returns:
        (residual [B, T / tensor, D], None).
    Raises:
        InputError: `column` keeps something, as serving does a cache, whose rows would be cut.
    Cost: `tensor` times as many matmuls, of B / tensor rows, and as many parts of each weight's
        gradient, added in its type.
    """
    num_members = lax.axis_size(TENSOR)
    num_rows, _, dim = x.shape
    if num_members == 1 or num_rows % num_members:
        return column_then_row(column, row, x, *by_token)
    group = num_rows // num_members
    x_here = x.reshape(group, -1, dim)
    x_next = x_here
    done: list[Array] = []  # the hidden rows of this device, then each other member's partial sums
    for distance in range(num_members):
        x_group = x_next
        if done:
            # Tie this group to the one before: XLA would otherwise begin with rows that have yet
            # to arrive, and send all groups' rows at once with nothing beside them.
            x_group, x_here, done[-1] = lax.optimization_barrier((x_group, x_here, done[-1]))
        if distance + 1 < num_members:
            x_next = _shift(x_here, -distance - 1)
        member = (lax.axis_index(TENSOR) + distance) % num_members
        group_rows = _rows_from(by_token, member * group, group)
        hidden, kept = column(x_group, *group_rows)
        _check_keeps_nothing(kept)
        done.append(row(hidden) if distance else hidden)
    # This device's rows are projected while the last sums are under way.
    done[0], done[-1] = lax.optimization_barrier((done[0], done[-1]))
    received: list[Array] = []
    for distance in range(1, num_members):
        leaving = done[distance]
        if received:
            # The backward sends the other way round. Without this it would send all at once.
            leaving, received[-1] = lax.optimization_barrier((leaving, received[-1]))
        received.append(_shift(leaving, distance))
    total = accumulator(row(done[0]))
    for y in received:
        total = total + accumulator(y)
    residual = total.astype(x.dtype)
    residual = residual.reshape(x.shape)
    return checkpoint_name(residual, EXCHANGED), None


def _rows_from(rows: Any, first: Array, num: int) -> Any:
    """Rows [first, first + num) of every array."""

    def one(leaf: Array) -> Array:
        return lax.dynamic_slice_in_dim(leaf, first, num)

    return jax.tree.map(one, rows)


def _check_keeps_nothing(kept: Any) -> None:
    if jax.tree.leaves(kept):
        raise InputError(
            "tensor.column_then_row_by_member",
            "a cache",
            "none, for its rows would be cut: `tensor.column_then_row` keeps one",
        )


def _shift(x: Array, distance: int) -> Array:
    """Sends every member's `x` to the member `distance` further on."""
    if distance == 0:
        return x
    num_members = lax.axis_size(TENSOR)
    pairs = [(i, (i + distance) % num_members) for i in range(num_members)]
    return lax.ppermute(x, TENSOR, pairs)


def whole_rows(x: Array) -> Array:
    """[B, T / sequence] of the tokens here to [B, T], whose order is the devices'."""
    return lax.all_gather(x, SEQUENCE, axis=1, tiled=True)


def own_tokens(x: Array) -> Array:
    """[B, T, ...] known to the whole group, cut to this device's tokens [B, T / tensor, ...]."""
    num_rows, length, *rest = x.shape
    num_own = length // lax.axis_size(TENSOR)
    start = lax.axis_index(TENSOR) * num_rows * num_own
    tokens = x.reshape(-1, *rest)
    own = lax.dynamic_slice_in_dim(tokens, start, num_rows * num_own)
    return own.reshape(num_rows, num_own, *rest)


def first_column(num: int) -> Array:
    """Index of this device's first element in a sharded dim of which each device has `num`."""
    return lax.axis_index(TENSOR) * num


def embed(table: Array, tokens: Array) -> Array:
    """Vocabulary-parallel look-up.

    Args:
        table: this device's share [V / tensor, D].
        tokens: [B, T], the same on every member; one outside the vocabulary has a residual of 0.
    Returns:
        The residual [B, T / tensor, D].
    """
    return reduce_scatter_tokens(_look_up(table, tokens))


def _look_up(table: Array, tokens: Array) -> Array:
    """Rows [B, T, D] of the local table; 0 for a token that another member's share has."""
    num_rows = table.shape[0]
    local = tokens - lax.axis_index(TENSOR) * num_rows
    is_here = ((local >= 0) & (local < num_rows))[..., None]
    found = look_up(table, jnp.clip(local, 0, num_rows - 1))
    return jnp.where(is_here, found, 0)


def token_loss(
    h: Array,
    head: Array | Head,
    labels: Array,
    softcap: float | None = None,
    *,
    axes: tuple[str, ...] = (TENSOR,),
) -> tuple[Array, Array]:
    """Vocabulary-parallel `ops.loss.token_loss` of this device's tokens.

    Args:
        h: hidden states [B, T, D] of the whole group's tokens.
        head: this device's share [V / tensor, D], or with a bias.
        labels: [B, T], the same on every member.
        softcap: as `ops.loss.unembed`.
        axes: over which the vocabulary is cut, the outermost first: of `tensor` and others, whose
            devices have the same tokens and get the same results.
    Returns:
        (nll, log-normaliser), both [B, T / tensor].
    """
    num_columns = loss.num_rows(head)
    local = labels - lax.axis_index(axes) * num_columns
    label, part = loss.label_and_normaliser(h, head, local, softcap)
    # lse = top + log(sum of exp(part - top)). The maximum keeps the exponentials from overflowing;
    # lse does not depend on it, so it carries no gradient.
    top = loss.finite_top(lax.pmax(lax.stop_gradient(part), axes))
    # The label's logit is 0 on all members but one, so it is summed in the same exchange.
    both = jnp.stack([jnp.exp(part - top), label], -1)
    others = tuple(axis for axis in axes if axis != TENSOR)
    both = reduce_scatter_tokens(lax.psum(both, others))
    total, label = jnp.moveaxis(both, -1, 0)
    lse = loss.log_of_sum(total, own_tokens(top))
    num_labels = num_columns * lax.axis_size(axes)
    return loss.nll_of(label, lse, own_tokens(labels), num_labels), lse


def kv_heads(weights: Array, axis: int, num_kv_heads: int) -> Array:
    """The kv heads that the local query heads read.

    A group with more members than there are kv heads holds all of them on each member, because a
    head cannot be sharded. The gradient of a head is then the sum over the members that read it, as
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


def refuse_logits(h: Array, head: Array | Head, softcap: float | None = None) -> Array:
    """`ops.loss.unembed` in training, where only one device has all rows of the unembedding.

    Raises:
        InputError: the tensor group has several members.
    """
    num_members = lax.axis_size(TENSOR)
    if num_members > 1:
        expected = (
            "1 for a loss that takes all logits; `Backends.token_loss` and "
            "`models.losses.token_log_probabilities` run over a vocabulary in shares"
        )
        raise InputError("MeshConfig.tensor", num_members, expected)
    return loss.unembed(h, head, softcap)


def sum_over_heads(x: Array) -> Array:
    """Sum over the heads that the group's members have.

    All members must have the same rows, which they have not in `column_then_row_by_member`. Each
    uses the sum for its own heads. So the gradient of a member's part is the sum over all members
    of the sum's cotangents, which is how psum transposes.
    """
    return lax.psum(x, TENSOR)


def sum_over_rows(x: Array) -> Array:
    """Sum over the devices that have tokens of the same rows.

    All of them know it, so that what is made of it must count on one of them: `is_counted`. Then
    its cotangent is zero on the others, and psum, which transposes to psum, brings it to all.
    """
    return lax.psum(x, (SEQUENCE, TENSOR))


def is_counted() -> Array:
    """1 on one of the devices that have tokens of the same rows, 0 on the others."""
    is_first = (lax.axis_index(SEQUENCE) == 0) & (lax.axis_index(TENSOR) == 0)
    return is_first.astype(jnp.float32)


def sum_over_tokens(x: Array) -> Array:
    """Sum over every device of this pipeline stage, of a figure whose gradient is stopped."""
    axes = tuple(axis for axis in AXES if axis != PIPELINE)
    return lax.psum(x, axes)


# Serving: the residual is replicated over the tensor group, and nothing is differentiated.


def sum_partial(y: Array) -> Array:
    """All-reduce of row-parallel matmuls' partial sums [B, T, D] to the replicated residual."""
    return lax.psum(y, TENSOR)


def embed_replicated(table: Array, tokens: Array) -> Array:
    """`embed` to the replicated residual [B, T, D]."""
    return lax.psum(_look_up(table, tokens), TENSOR)


def logits(h: Array, head: Array | Head, softcap: float | None = None) -> Array:
    """Vocabulary-parallel `ops.loss.unembed`, all-gathered; not to be differentiated.

    Args:
        h: hidden states [B, T, D], the same on every member.
        head: this device's share [V / tensor, D], or with a bias.
        softcap: as `ops.loss.unembed`.
    Returns:
        [B, T, V] on every member.
    Cost: an all-gather of B T V elements in at least float32.
    """
    local = loss.unembed(h, head, softcap)  # local: [B, T, V / tensor]
    vocabulary = local.ndim - 1
    return lax.all_gather(local, TENSOR, axis=vocabulary, tiled=True)
