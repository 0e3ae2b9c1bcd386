"""A reward model: a decoder whose values say which of two answers is the better one."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxscale.models.decoder import Decoder
from jaxscale.models.losses import DecoderLoss, row_numbers, sum_by_group
from jaxscale.models.values import token_values
from jaxscale.ops.collectives import Collectives
from jaxscale.rlhf.log_probabilities import residual
from jaxscale.rlhf.preferences import sums_over_pairs
from jaxscale.types import (
    Array,
    Batch,
    InputError,
    Params,
    check_choice,
    check_not_negative,
)


@dataclasses.dataclass(frozen=True)
class RewardLoss(DecoderLoss):
    """-log sigmoid of how much more the chosen answer is worth than the rejected one.

    The score of an answer is the value of its last token. "last_token" compares the scores alone.
    "each_token" is the mean over the tokens from the first in which the two differ to the end of
    the longer one; beyond its end the shorter one keeps its score. (DeepSpeed-Chat compares there
    with values of padding, which no score ever reads.)

    Source: Yao et al. 2023, DeepSpeed-Chat (arXiv 2308.01320), step 2, as released, for
        "each_token"; Ouyang et al. 2022 (arXiv 2203.02155), equation 1, for "last_token";
        Eisenstein et al. 2023 (arXiv 2312.09244), section 2, for the centering.
    Args:
        model: the model; it has a value head.
        compared: "each_token" or "last_token".
        centering: weight of the square of the sum of both scores.
    """

    compared: str = "each_token"
    centering: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not self.model.use_value_head:
            expected = "True for reward_loss, which learns values in the place of logits"
            raise InputError("ModelConfig.use_value_head", False, expected)
        check_choice("reward_loss.compared", self.compared, ("each_token", "last_token"))
        check_not_negative("reward_loss.centering", self.centering)

    def sums(
        self,
        decoder: Decoder,
        params: Params,
        batch: Batch,
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Sums over the pairs of this device's rows.

        Args:
            decoder: bound to the mesh's operations.
            params: the parameter tree.
            batch: as `DpoLoss` takes it; an answer ends with the last token that is predicted with
                a weight.
        Returns:
            (sum_loss, number of pairs, sums as `sums_over_pairs`; an answer's reward is its score).
        """
        collectives = decoder.operations.collectives
        values = token_values(decoder, params, residual(decoder, params, batch))
        pairs = _pairs(batch, collectives)
        values = _by_place(values, batch, pairs, collectives)
        row = jnp.arange(len(values))[:, None]
        scores = values[row, pairs.starts + pairs.lengths - 1]
        chosen, rejected = scores[:, ::2], scores[:, 1::2]
        margin = chosen - rejected
        is_each = self.compared == "each_token"
        loss = _mean_loss(values, pairs) if is_each else jax.nn.softplus(-margin)
        loss = loss + self.centering * (chosen + rejected) ** 2
        is_pair = (pairs.lengths[:, ::2] > 0) & (pairs.lengths[:, 1::2] > 0)
        counted = is_pair * collectives.is_counted()
        return sums_over_pairs(loss, chosen, rejected, counted)


class Pairs(NamedTuple):
    """Where the answers of each row are, once its tokens stand document by document, at places.

    P pairs fit into a row, and two documents each; all of those that it has not is 0.

    Args:
        tokens: [B, T] by place.
        documents: [B, T] number of each place's document; -1 for padding.
        starts: [B, 2 P] place of each document's first token.
        lengths: [B, 2 P] its tokens up to the last one of its answer.
    """

    tokens: Array
    documents: Array
    starts: Array
    lengths: Array


def _pairs(batch: Batch, collectives: Collectives) -> Pairs:
    """Of the local rows; all devices that have tokens of the same rows return the same."""
    names = ("tokens", "segments", "positions", "weights")
    tokens, segments, positions, weights = (collectives.whole_rows(batch[name]) for name in names)
    num_rows, length = tokens.shape
    row = jnp.arange(num_rows)[:, None]
    # As in `DpoLoss` a pair has five tokens at least. Document 0 is padding, and no token's.
    num_documents = 2 * max(length // 5, 1)
    by_document = jnp.zeros((num_rows, 1 + num_documents), jnp.int32)
    sizes = by_document.at[row, segments].add(segments > 0)
    # The last token with a weight predicts the last one of the answer.
    ends = jnp.where(weights > 0, positions + 2, 0)
    lengths = by_document.at[row, segments].max(ends)[:, 1:]
    starts = (jnp.cumsum(sizes, 1, jnp.int32) - sizes)[:, 1:]
    place = _places(segments, positions, starts, length)
    by_place = jnp.zeros((num_rows, length), jnp.int32).at[row, place]
    documents = by_place.set(segments, mode="drop") - 1
    return Pairs(by_place.set(tokens, mode="drop"), documents, starts, lengths)


def _places(
    segments: Array,
    positions: Array,
    starts: Array,
    length: int,
) -> Array:
    """[B, T] the place of each token in its row of that length, which is also that of padding."""
    row = jnp.arange(len(segments))[:, None]
    place = starts[row, jnp.maximum(segments, 1) - 1] + positions
    return jnp.where(segments > 0, place, length)


def _by_place(
    values: Array,
    batch: Batch,
    pairs: Pairs,
    collectives: Collectives,
) -> Array:
    """Values [B, own T] of own tokens to those of whole rows by place, [B, T]."""
    num_rows, length = pairs.tokens.shape
    place = _places(batch["segments"], batch["positions"], pairs.starts, length)
    groups = jnp.where(place < length, row_numbers(batch) * length + place, -1)
    sums = sum_by_group(values, groups, num_rows * length, collectives)
    return sums.reshape(num_rows, length)


def _mean_loss(values: Array, pairs: Pairs) -> Array:
    """Mean loss of the compared tokens of each pair, [B, P], of values [B, T] by place."""
    num_rows, length = values.shape
    row = jnp.arange(num_rows)[:, None]
    # Each token of the longer answer is compared with the one of the shorter that has its position.
    document = jnp.maximum(pairs.documents, 0)
    other, pair = document ^ 1, document // 2
    position = jnp.arange(length, dtype=jnp.int32) - pairs.starts[row, document]
    size, other_size = pairs.lengths[row, document], pairs.lengths[row, other]
    is_chosen = document % 2 == 0
    is_longer = (size > other_size) | ((size == other_size) & is_chosen)
    is_used = (pairs.documents >= 0) & is_longer & (position < size)
    partner = pairs.starts[row, other] + jnp.minimum(position, other_size - 1)
    differs = (pairs.tokens != pairs.tokens[row, partner]) | (position >= other_size)
    # Of answers without a difference the last tokens are compared.
    longest = pairs.lengths.reshape(num_rows, -1, 2).max(-1)
    first = (longest - 1).at[row, pair].min(jnp.where(is_used & differs, position, length))
    margin = jnp.where(is_chosen, 1, -1) * (values - values[row, partner])
    loss = jax.nn.softplus(-margin) / (longest - first)[row, pair]
    is_compared = is_used & (position >= first[row, pair])
    return jnp.zeros_like(longest, values.dtype).at[row, pair].add(jnp.where(is_compared, loss, 0))
