"""The loss of answers that the model itself wrote and that were rewarded."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from jaxscale.models.decoder import Decoder
from jaxscale.models.losses import DecoderLoss
from jaxscale.rlhf.log_probabilities import log_probabilities, reference_log_probabilities
from jaxscale.types import Array, Batch, InputError, Params, check_not_negative


@dataclasses.dataclass(frozen=True)
class PolicyLoss(DecoderLoss):
    """The policy gradient of rewarded answers, with a price on leaving the reference.

    Of a token with the advantage A it is -A p / sg(p) + beta (q / p - log(q / p) - 1): p is the
    model's probability, q that of the reference, the model without its adapters, and sg stops the
    gradient. Each answer is learned from once, by the model that wrote it, so that the ratio p /
    sg(p) is 1 and there is nothing to clip.

    Source: Shao et al. 2024, GRPO (arXiv 2402.03300), equations 3 and 4, with one update for each
        group of answers. The mean is over the tokens of all answers, as in Yu et al. 2025, DAPO
        (arXiv 2503.14476), equation 8, and not first over those of each: there a token of a long
        answer counts less than one of a short answer.
    Args:
        model: the model; it has adapters where beta is above 0.
        beta: price of the divergence from the reference, in rewards a nat; without it no
            reference is asked.
    """

    beta: float = 0.04

    def __post_init__(self):
        super().__post_init__()
        check_not_negative("policy_loss.beta", self.beta)
        if self.beta and self.model.lora is None:
            expected = (
                "adapters with policy_loss.beta above 0: the reference is the model without them, "
                "see `jaxscale adapt`"
            )
            raise InputError("ModelConfig.lora", None, expected)

    def sums(
        self,
        decoder: Decoder,
        params: Params,
        batch: Batch,
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Sums over this device's own tokens of answers.

        Args:
            decoder: bound to the mesh's operations.
            params: the parameter tree.
            batch: tokens, labels, weights (1 where the label is an answer's token), segments,
                positions and advantages, [B, T].
        Returns:
            (sum_loss, number of tokens, sums over tokens: {"entropy": -log p of what was drawn,
            whose mean estimates the entropy; with a reference also "kl", the divergence from it as
            above}).
        """
        own = decoder.operations.collectives.own_tokens
        weights, advantages = own(batch["weights"]), own(batch["advantages"])

        # A label without weight may be a forbidden word, whose log-probability is -inf.
        is_counted = weights != 0
        log_p = jnp.where(is_counted, log_probabilities(decoder, params, batch), 0)
        ratio = jnp.exp(log_p - lax.stop_gradient(log_p))
        loss = (-advantages * ratio * weights).sum()
        figures = {"entropy": (-log_p * weights).sum()}
        if self.beta:
            reference = reference_log_probabilities(decoder, params, batch)
            log_ratio = jnp.where(is_counted, reference - log_p, 0)
            kl = ((jnp.expm1(log_ratio) - log_ratio) * weights).sum()
            loss += self.beta * kl
            figures["kl"] = kl
        return loss, weights.sum(), figures
