"""Proximal policy optimisation: answers are learned from by what a critic had expected of them."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxscale.models.config import ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.losses import DecoderLoss, row_numbers, sum_by_group
from jaxscale.ops.backends import Operations
from jaxscale.rlhf.critic import critic_values
from jaxscale.rlhf.log_probabilities import log_probabilities, reference_log_probabilities
from jaxscale.types import (
    Array,
    Batch,
    InputError,
    Params,
    check_not_negative,
    check_positive,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoLoss(DecoderLoss):
    """The clipped gain of an answer's tokens, and the clipped error of their values.

    Of a token with the advantage A that is now r times as probable as when it was written, it is
    max(-A r, -A clip(r, 1 - c, 1 + c)) + max((V - R)^2, (V' - R)^2) / 2: V is its value, R = A plus
    the value before, and V' is V, but at most `value_clip` from the value before. Policy and critic
    share no parameter, so that neither part needs a weight.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; Yao et al. 2023, DeepSpeed-Chat
        (arXiv 2308.01320), step 3, as released, for the values, the rewards and all defaults.
    Args:
        model: the policy; it has adapters where kl_penalty is above 0.
        critic: a model with a value head.
        gamma: discount of a reward that comes a token later.
        gae_lambda: lambda of `experience.advantages`.
        kl_penalty: price of each token's log p - log p of the reference, the policy without its
            adapters; with 0 no reference is asked.
        score_clip: an answer's reward counts as at most this and at least minus this.
        ratio_clip: c; epsilon of the paper.
        value_clip: how far a value may move with a gain.
        num_epochs: updates by the answers of one step, each by all of them.
    """

    critic: ModelConfig
    gamma: float = 1.0
    gae_lambda: float = 0.95
    kl_penalty: float = 0.1
    score_clip: float = 5.0
    ratio_clip: float = 0.2
    value_clip: float = 0.2
    num_epochs: int = 1

    def __post_init__(self):
        super().__post_init__()
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"ppo_loss.{name}", getattr(self, name), "from 0 to 1")
        for name in ("score_clip", "value_clip", "num_epochs"):
            check_positive(f"ppo_loss.{name}", getattr(self, name))
        if not 0 < self.ratio_clip < 1:
            raise InputError("ppo_loss.ratio_clip", self.ratio_clip, "above 0 and below 1")
        check_not_negative("ppo_loss.kl_penalty", self.kl_penalty)
        if self.kl_penalty and self.model.lora is None:
            expected = (
                "adapters with ppo_loss.kl_penalty above 0: the reference is the model without "
                "them, see `jaxscale adapt`"
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
            decoder: of the policy, bound to the mesh's operations.
            params: the parameter tree, with the critic's.
            batch: tokens, labels, weights (1 where the label is an answer's token), segments,
                positions, and as of when the answers were written log_p, values and advantages,
                [B, T].
        Returns:
            (sum_loss, number of tokens, sums over tokens: {"policy_loss", "value_loss", "entropy":
            -log p of what was drawn, "clipped": ratios beyond the clip}).
        """
        own = decoder.operations.collectives.own_tokens
        names = ("weights", "log_p", "values", "advantages")
        weights, old_log_p, old_values, advantages = (own(batch[name]) for name in names)

        # A label without weight may be a forbidden word, whose log-probability is -inf.
        log_p = jnp.where(weights != 0, log_probabilities(decoder, params, batch), 0)
        ratio = jnp.exp(log_p - old_log_p)
        clipped = jnp.clip(ratio, 1 - self.ratio_clip, 1 + self.ratio_clip)
        of_policy = (jnp.maximum(-advantages * ratio, -advantages * clipped) * weights).sum()

        values = critic_values(decoder, self.critic, params, batch)
        returns = advantages + old_values
        near = jnp.clip(values, old_values - self.value_clip, old_values + self.value_clip)
        error = jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
        of_values = (error * weights).sum() / 2
        figures = {
            "policy_loss": of_policy,
            "value_loss": of_values,
            "entropy": (-log_p * weights).sum(),
            "clipped": ((ratio != clipped) * weights).sum(),
        }
        return of_policy + of_values, weights.sum(), figures

    def before(
        self,
        params: Params,
        batch: Batch,
        *,
        operations: Operations,
    ) -> dict[str, Any]:
        """What the models say of answers before they learn from them, 0 at other tokens.

        Returns:
            log_p, values and, with a price on leaving it, the reference's log_p, each [B, T]: whole
            rows in the order of positions, the same on all devices that have tokens of them.
        """
        decoder = self.decoder(operations)
        collectives = operations.collectives
        found = {
            "log_p": log_probabilities(decoder, params, batch),
            "values": critic_values(decoder, self.critic, params, batch),
        }
        if self.kl_penalty:
            found["reference"] = reference_log_probabilities(decoder, params, batch)
        num_rows, length = collectives.whole_rows(batch["positions"]).shape
        place = row_numbers(batch) * length + batch["positions"]
        place = jnp.where(batch["weights"] == 0, -1, place)
        size = num_rows * length
        return {
            name: sum_by_group(each, place, size, collectives).reshape(num_rows, length)
            for name, each in found.items()
        }
