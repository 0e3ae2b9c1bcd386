"""Losses under the contract loss_fn(params, batch, key) -> (sum_loss, sum_weight, metrics), all of them sums."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxscale.models import transformer
from jaxscale.models.config import ModelConfig
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.loss import sum_over_chunks
from jaxscale.ops.operations import Operations
from jaxscale.ops.precision import Policy
from jaxscale.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """Cross-entropy of the next token, with z-loss and, for MoE models, the router's losses.

    Source: z-loss, Chowdhery et al. 2022 (arXiv 2204.02311), section 5.
    Args:
        model: the model.
        policy: dtype policy.
        stack: how the layers run.
        z_loss: weight of log^2 Z.
    """

    model: ModelConfig
    policy: Policy
    stack: StackConfig
    z_loss: float = 0.0

    def __call__(
        self, params: Params, batch: Batch, key: Any, *, operations: Operations | None = None
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Sums over this device's own tokens.

        Args:
            params: the parameter tree.
            batch: tokens, labels, weights, positions and optionally segments, [B, T].
            key: unused; for losses that draw.
            operations: what the mesh injects.
        Returns:
            (sum_loss, sum_weight, {"nll": [], "load": [MoE layers in order, E] choices, for MoE models}).
        """
        operations = operations or self.stack.operations()
        settings = dict(config=self.model, operations=operations, policy=self.policy)
        x = transformer.embed(params, batch, **settings)
        context = transformer.attention_context(batch, self.model)
        x, _, routers = transformer.run_layers(params, x, context, batch["weights"], stack=self.stack, **settings)
        h = transformer.final_hidden(params, x, **settings)
        head = transformer.unembedding(params, **settings)

        def chunk(h: Array, head: Array, labels: Array, weights: Array) -> tuple[Array, Array, Array]:
            logits = transformer.unembed(h, head, self.model)
            nll, normaliser = operations.token_loss(logits, labels)
            weights = operations.own(weights)
            nll, z = (nll * weights).sum(), (normaliser**2 * weights).sum()
            return nll + self.z_loss * z, nll, weights.sum()

        loss, nll, weight = sum_over_chunks(
            chunk, self.stack.num_loss_chunks, h, head, batch["labels"], batch["weights"]
        )
        metrics = {"nll": nll}
        if any(self.model.moe_pattern):
            loss = loss + sum(router.balance.sum() + router.z.sum() for router in routers)
            loads = [r.load for r, kind in zip(routers, self.model.pattern, strict=True) if kind.is_moe]
            metrics["load"] = jnp.stack(loads, 1).reshape(-1, self.model.num_experts)
        return loss, weight, metrics
