"""The loss of answers that the model itself wrote and that were rewarded."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxscale.models.config import ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.ops.backends import Operations
from jaxscale.ops.precision import Policy
from jaxscale.rlhf.log_probabilities import log_probabilities, reference_log_probabilities
from jaxscale.types import Array, Batch, InputError, Params, check_not_negative


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
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
        model: the model; it is causal, and has adapters where beta is above 0.
        policy: dtype policy.
        execution: how the layers run.
        beta: price of the divergence from the reference, in rewards a nat; without it no
            reference is asked.
    """

    model: ModelConfig
    policy: Policy
    execution: ExecutionConfig
    beta: float = 0.04

    def __post_init__(self):
        if not self.model.is_causal:
            expected = "True for log-probabilities of answers: else a token sees its own label"
            raise InputError("ModelConfig.is_causal", False, expected)
        check_not_negative("policy_loss.beta", self.beta)
        if self.beta and self.model.lora is None:
            expected = (
                "adapters with policy_loss.beta above 0: the reference is the model without them, "
                "see `jaxscale adapt`"
            )
            raise InputError("ModelConfig.lora", None, expected)

    def __call__(
        self,
        params: Params,
        batch: Batch,
        key: Any,
        *,
        operations: Operations | None = None,
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Sums over this device's own tokens of answers.

        Args:
            params: the parameter tree.
            batch: tokens, labels, weights (1 where the label is an answer's token), segments,
                positions and advantages, [B, T].
            key: unused: nothing is drawn, also no dropout.
            operations: what the mesh injects.
        Returns:
            (sum_loss, number of tokens, sums over tokens: {"entropy": -log p of what was drawn,
            whose mean estimates the entropy; with a reference also "kl", the divergence from it as
            above}).
        """
        operations = operations or self.execution.operations()
        batch = {name: array for name, array in batch.items() if name != "token_keys"}
        own = operations.collectives.own_tokens
        weights, advantages = own(batch["weights"]), own(batch["advantages"])
        decoder = Decoder(self.model, operations, self.policy, self.execution)

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
