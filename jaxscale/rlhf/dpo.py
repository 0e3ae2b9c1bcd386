"""Direct preference optimisation: a model learns which of two answers was preferred."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxscale.models.decoder import Decoder
from jaxscale.models.losses import DecoderLoss, document_numbers, sum_by_group
from jaxscale.rlhf.log_probabilities import log_probabilities, reference_log_probabilities
from jaxscale.rlhf.preferences import sums_over_pairs
from jaxscale.types import Array, Batch, InputError, Params, check_positive


@dataclasses.dataclass(frozen=True)
class DpoLoss(DecoderLoss):
    """-log sigmoid of how much more than the reference the model prefers the chosen answer.

    The reference is the same model without its adapters, so that no second one is kept: before the
    first update both are equal and the loss is log 2. What an answer is worth, its reward, is
    beta (log p - log p_reference), summed over its tokens.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; smoothed labels, Mitchell 2023, "A
        note on DPO with noisy preferences", equation 3.
    Args:
        model: the model; it has adapters.
        beta: weight of the divergence from the reference.
        label_smoothing: probability that a pair is the wrong way round.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.model.lora is None:
            expected = "adapters: the reference is the model without them, see `jaxscale adapt`"
            raise InputError("ModelConfig.lora", None, expected)
        check_positive("dpo_loss.beta", self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            expected = "0 <= label_smoothing < 0.5"
            raise InputError("dpo_loss.label_smoothing", self.label_smoothing, expected)

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
            batch: tokens, labels, weights, positions and segments, [B, T]. Segments 2 p + 1 and
                2 p + 2 of a row are the chosen and the rejected answer of its pair p, with their
                prompts; only the tokens of answers have a weight.
        Returns:
            (sum_loss, number of pairs, sums as `sums_over_pairs`).
        """
        rewards, is_pair = self._rewards(decoder, params, batch)
        chosen, rejected = rewards[..., 0], rewards[..., 1]
        margin = chosen - rejected
        smoothing = self.label_smoothing
        loss = (1 - smoothing) * jax.nn.softplus(-margin) + smoothing * jax.nn.softplus(margin)
        counted = is_pair * decoder.operations.collectives.is_counted()
        return sums_over_pairs(loss, chosen, rejected, counted)

    def _rewards(
        self,
        decoder: Decoder,
        params: Params,
        batch: Batch,
    ) -> tuple[Array, Array]:
        """(those of chosen and rejected answers [B, pairs, 2], whether there is the pair)."""
        log_p = log_probabilities(decoder, params, batch)
        reference = reference_log_probabilities(decoder, params, batch)
        collectives = decoder.operations.collectives
        # A label without weight may be a forbidden word, of which both are -inf.
        own_weights = collectives.own_tokens(batch["weights"])
        ratio = jnp.where(own_weights == 0, 0, log_p - reference)
        segments = collectives.whole_rows(batch["segments"])
        num_rows, length = segments.shape
        # A pair has five tokens at least: two prompts, two answers, and the one that ends it.
        num_pairs = max(length // 5, 1)
        sums = sum_by_group(
            self.beta * ratio * own_weights,
            document_numbers(batch, 2 * num_pairs),
            num_rows * 2 * num_pairs,
            collectives,
        )
        is_pair = 2 * jnp.arange(1, num_pairs + 1) <= segments.max(1, keepdims=True)
        return sums.reshape(num_rows, num_pairs, 2), is_pair
