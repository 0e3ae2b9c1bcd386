"""Losses under the contract loss_fn(params, batch, key) -> (sum_loss, sum_weight, metrics), all of them sums."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxscale.models import transformer
from jaxscale.models.config import ModelConfig
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.draws import Draws
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
        embedding_noise: half the width of the noise on embeddings in training, see
            `transformer.add_noise`.
    """

    model: ModelConfig
    policy: Policy
    stack: StackConfig
    z_loss: float = 0.0
    embedding_noise: float = 0.0

    def __call__(
        self, params: Params, batch: Batch, key: Any, *, operations: Operations | None = None
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Sums over this device's own tokens.

        Args:
            params: the parameter tree.
            batch: tokens, labels, weights, positions and optionally segments, [B, T], and in
                training `token_keys`, see `ops.draws.with_token_keys`; without them nothing is
                drawn.
            key: unused: what this loss draws comes from the batch's `token_keys`.
            operations: what the mesh injects.
        Returns:
            (sum_loss, sum_weight, {"nll": [], "load": [MoE layers in order, E] choices, for MoE
            models}).
        """
        operations = operations or self.stack.operations()
        x = self.start(params, batch, operations=operations)
        x, router_loss, layer_metrics = self.body(params["layers"], x, batch, operations=operations)
        loss, weight, metrics = self.finish(params, x, batch, operations=operations)
        return loss + router_loss, weight, metrics | layer_metrics

    def start(self, params: Params, batch: Batch, *, operations: Operations) -> Array:
        """Embedding and prefix: the residual [B, own T, D] before the stack; `layers` is not read."""
        settings = dict(config=self.model, operations=operations, policy=self.policy)
        x = transformer.embed(params, batch, **settings)
        if self.embedding_noise and "token_keys" in batch:
            x = transformer.add_noise(
                x, Draws(batch["token_keys"]), self.embedding_noise, operations
            )
        context = transformer.attention_context(batch, self.model)
        return transformer.run_prefix(
            params, x, context, batch["weights"], stack=self.stack, **settings
        )[0]

    @property
    def is_by_period(self) -> bool:
        """Whether `body` is best given its periods apart, for it runs them unrolled."""
        return not self.stack.is_scanned

    def prepare(self, layers: Params) -> Params:
        """The tree `layers` in the types that `body` uses, once a step: its micro-batches need not convert it again."""
        return transformer.to_compute(layers, self.policy)

    def body(
        self,
        layers: Params,
        x: Array,
        batch: Batch,
        number: Array | None = None,
        is_real: Array | None = None,
        *,
        operations: Operations,
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Consecutive periods of the stack.

        Args:
            layers: the tree `layers`, of any number of periods; or, if unrolled, a tuple of their
                trees.
            x: residual [B, own T, D].
            batch: as `__call__`.
            number: [periods] of each period in the model's stack; None for all of them in order.
            is_real: [periods] bool, false for periods to skip; None skips none.
            operations: what the mesh injects.
        Returns:
            (residual, the routers' losses, metrics with a leading dim of MoE layers).
        """
        settings = dict(
            config=self.model, operations=operations, policy=self.policy, stack=self.stack
        )
        context = transformer.attention_context(batch, self.model)
        periods = None if number is None else transformer.Periods(number, is_real)
        draws = Draws(batch["token_keys"]) if "token_keys" in batch else None
        x, _, routers = transformer.run_stack(
            layers, x, context, batch["weights"], None, periods, draws, **settings
        )
        if not any(self.model.moe_pattern):
            return x, jnp.zeros((), jnp.float32), {}
        loss = sum(router.balance.sum() + router.z.sum() for router in routers)
        loads = [r.load for r, kind in zip(routers, self.model.pattern, strict=True) if kind.is_moe]
        return x, loss, {"load": jnp.stack(loads, 1).reshape(-1, self.model.num_experts)}

    def finish(
        self, params: Params, x: Array, batch: Batch, *, operations: Operations
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Final norm, unembedding and cross-entropy, as sums; `layers` is not read."""
        settings = dict(config=self.model, operations=operations, policy=self.policy)
        h = transformer.final_hidden(params, x, **settings)
        head = transformer.unembedding(params, **settings)

        def chunk(
            h: Array, head: Array, labels: Array, weights: Array
        ) -> tuple[Array, Array, Array]:
            nll, normaliser = operations.token_loss(h, head, labels, self.model.logit_softcap)
            weights = operations.own(weights)
            nll, z = (nll * weights).sum(), (normaliser**2 * weights).sum()
            return nll + self.z_loss * z, nll, weights.sum()

        loss, nll, weight = sum_over_chunks(
            chunk, self.stack.num_loss_chunks, h, head, batch["labels"], batch["weights"]
        )
        return loss, weight, {"nll": nll}
