"""Losses: loss_fn(params, batch, key, *, operations) -> (sum_loss, sum_weight, metrics), all sums.

A plain function of this form trains on any mesh without a pipeline; `DecoderLoss` makes one of what
a loss does with a decoder. A pipeline runs a loss in parts and wants an object like
`NextTokenLoss`, see `parallel.pipeline.loss.StagedLoss`.
"""

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.models.config import ModelConfig
from jaxscale.models.decoder import Decoder, Periods
from jaxscale.models.execution import ExecutionConfig
from jaxscale.ops.backends import Operations
from jaxscale.ops.collectives import Collectives
from jaxscale.ops.loss import sum_over_chunks
from jaxscale.ops.precision import Policy
from jaxscale.types import Array, Batch, InputError, Params


@dataclasses.dataclass(frozen=True)
class DecoderLoss(abc.ABC):
    """A loss of what a decoder computes; each kind of it says by `sums` what that is.

    Args:
        model: the model.
        policy: dtype policy.
        execution: how the layers run.
    Raises:
        InputError: the model is not causal, or for `MaskedTokenLoss` is.
    """

    model: ModelConfig
    policy: Policy
    execution: ExecutionConfig

    def __post_init__(self):
        if not self.model.is_causal:
            expected = f"True for {type(self).__name__}: else a token sees what follows it"
            raise InputError("ModelConfig.is_causal", False, expected)

    def decoder(self, operations: Operations) -> Decoder:
        """The model, bound to what a mesh injects."""
        return Decoder(self.model, operations, self.policy, self.execution)

    def __call__(
        self,
        params: Params,
        batch: Batch,
        key: Any,
        *,
        operations: Operations | None = None,
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Sums over this device's part of the batch.

        Args:
            params: the parameter tree.
            batch: as `sums` takes it.
            key: unused: what a loss draws comes from the batch's `token_keys`, see
                `ops.draws.with_token_keys`.
            operations: what the mesh injects; None for one device.
        Returns:
            What `sums` returns.
        """
        operations = operations or self.execution.operations()
        return self.sums(self.decoder(operations), params, batch)

    @abc.abstractmethod
    def sums(
        self,
        decoder: Decoder,
        params: Params,
        batch: Batch,
    ) -> tuple[Array, Array, dict[str, Array]]:
        """(sum_loss, sum_weight, sums of metrics) of a batch; a mesh is bound to the decoder."""


@dataclasses.dataclass(frozen=True)
class NextTokenLoss(DecoderLoss):
    """Cross-entropy of the next token, with z-loss and, for mixtures, the router's losses.

    Source: z-loss, Chowdhery et al. 2022 (arXiv 2204.02311), section 5.
    Args:
        z_loss: weight of log^2 Z.
        embedding_noise: half the width of the noise on embeddings in training, see
            `Decoder.add_noise`.
    """

    z_loss: float = 0.0
    embedding_noise: float = 0.0

    def sums(
        self,
        decoder: Decoder,
        params: Params,
        batch: Batch,
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Sums over this device's own tokens.

        Args:
            decoder: bound to the mesh's operations.
            params: the parameter tree.
            batch: tokens, labels, weights, positions and optionally segments, [B, T]; a label
                outside the vocabulary, such as -100, does not count, whatever its weight, and one
                that the head's bias forbids makes the loss infinite if its weight is not 0. In
                training also `token_keys`; without them nothing is drawn.
        Returns:
            (sum_loss, sum_weight, {"nll": [], "load": [MoE layers in order, E] choices, for
            mixtures}).
        """
        operations = decoder.operations
        x = self.start(params, batch, operations=operations)
        x, router_loss, by_layer = self.body(params["layers"], x, batch, operations=operations)
        loss, weight, metrics = self.finish(params, x, batch, operations=operations)
        return loss + router_loss, weight, metrics | by_layer

    # The parts that the stages of a pipeline run

    def start(
        self,
        params: Params,
        batch: Batch,
        *,
        operations: Operations,
    ) -> Array:
        """Embedding and prefix: the residual [B, own T, D].

        Args:
            params: the parameter tree; its `layers` are not read, and may be missing.
            batch: as in `sums`.
            operations: what the mesh injects.
        """
        decoder = self.decoder(operations)
        tokens = decoder.tokens(batch)
        x = decoder.embed(params, batch)
        if self.embedding_noise and tokens.draws is not None:
            x = decoder.add_noise(x, tokens.draws, self.embedding_noise)
        return decoder.run_prefix(params, x, tokens)[0]

    @property
    def is_by_period(self) -> bool:
        """Whether `body` is best given its periods apart, because it runs them unrolled."""
        return not self.execution.is_scanned

    def prepare(self, layers: Params) -> Params:
        """The tree `layers` in the types that `body` uses.

        Done once a step, so that no micro-batch converts it again.
        """
        return self.decoder(Operations()).to_compute("layers", layers)

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
            layers: as `Decoder.run_stack`.
            x: residual [B, own T, D].
            batch: as in `sums`.
            number: [periods] of each period in the model's stack; None for all of them in order.
            is_real: [periods] bool, false for periods to skip; None skips none.
            operations: what the mesh injects.
        Returns:
            (residual, the routers' losses, metrics with a leading dim of MoE layers).
        """
        decoder = self.decoder(operations)
        periods = None if number is None else Periods(number, is_real)
        tokens = decoder.tokens(batch)
        x, _, routers = decoder.run_stack(layers, x, tokens, None, periods)
        if not self.model.num_experts:
            return x, jnp.zeros((), jnp.float32), {}
        loss = sum(router.balance.sum() + router.z.sum() for router in routers)
        loads = [
            router.load
            for router, layer in zip(routers, self.model.pattern, strict=True)
            if layer.is_moe
        ]
        load = jnp.stack(loads, 1).reshape(-1, self.model.num_experts)
        return x, loss, {"load": load}

    def finish(
        self,
        params: Params,
        x: Array,
        batch: Batch,
        *,
        operations: Operations,
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Final norm, unembedding and cross-entropy.

        Args:
            params: the parameter tree; its `layers` are not read, and may be missing.
            x: residual after the layers, [B, own T, D].
            batch: as in `sums`.
            operations: what the mesh injects.
        Returns:
            (sum_loss with z-loss, sum_weight, {"nll": its sum without z-loss}).
        """
        decoder = self.decoder(operations)
        h = decoder.hidden(params, x)
        head = decoder.head(params)

        def chunk(
            h: Array,
            head: Array,
            labels: Array,
            weights: Array,
        ) -> tuple[Array, Array, Array]:
            nll, normaliser = decoder.token_loss(h, head, labels)
            own_tokens = operations.collectives.own_tokens
            own_labels = own_tokens(labels)
            is_known = (own_labels >= 0) & (own_labels < self.model.vocab_size)
            weights = jnp.where(is_known, own_tokens(weights), 0)
            # A token that does not count adds 0, also where its loss is infinite.
            nll, normaliser = (jnp.where(weights == 0, 0, each) for each in (nll, normaliser))
            nll, z = (nll * weights).sum(), (normaliser**2 * weights).sum()
            return nll + self.z_loss * z, nll, weights.sum()

        num_chunks = self.execution.num_loss_chunks
        loss, nll, weight = sum_over_chunks(
            chunk, num_chunks, h, head, batch["labels"], batch["weights"]
        )
        return loss, weight, {"nll": nll}


def token_log_probabilities(
    decoder: Decoder,
    params: Params,
    x: Array,
    labels: Array,
) -> Array:
    """log p of each own token's label, with a gradient; the logits of one chunk exist at a time.

    Args:
        decoder: bound to the mesh's operations.
        params: the parameter tree.
        x: residual after the layers, [B, own T, D].
        labels: [B, T] int32; one outside the vocabulary has 0, and one that the head's bias forbids
            -inf without a gradient.
    Returns:
        [B, own T] in at least float32.
    Raises:
        InputError: the decoder's number of loss chunks does not divide the own tokens.
    """
    collectives, backends = decoder.operations.collectives, decoder.operations.backends
    num_chunks = decoder.execution.num_loss_chunks
    head = decoder.head(params)
    # A diagnosis counts in the tensors that are named, and cannot take a count out of a loop.
    unnamed = dataclasses.replace(backends, name=lambda path, x: x)
    inner = dataclasses.replace(decoder, operations=Operations(collectives, unnamed))

    # Own tokens are cut and each chunk of them is gathered, so that what comes back are the same
    # own tokens. Cut after gathering, a chunk's own tokens would be other ones.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(chunk: tuple[Array, Array]) -> Array:
        x, own_labels = chunk
        h = inner.hidden(params, x)
        labels = collectives.gather_tokens(own_labels[..., None])[..., 0]
        nll, _ = inner.token_loss(h, head, labels)
        return -nll

    num_own = x.shape[1]
    if num_own % num_chunks:
        expected = f"own tokens % num_loss_chunks == 0, but {num_own} % {num_chunks} is not 0"
        raise InputError("ExecutionConfig.num_loss_chunks", num_chunks, expected)

    def split(x: Array) -> Array:
        by_chunk = x.reshape(x.shape[0], num_chunks, -1, *x.shape[2:])
        return jnp.moveaxis(by_chunk, 1, 0)

    own_labels = collectives.own_tokens(labels)
    found = lax.map(one, (split(x), split(own_labels)))
    return jnp.moveaxis(found, 0, 1).reshape(x.shape[:2])


def sum_by_group(
    values: Array,
    groups: Array,
    num_groups: int,
    collectives: Collectives,
) -> Array:
    """Sums of the own tokens' values over groups of tokens, such as rows or documents.

    On a mesh all devices that have tokens of the same rows return the same sums. A loss of such
    sums must count on one of them: multiply it by `collectives.is_counted()`.

    Args:
        values: [B, own T].
        groups: [B, T] int32 number of each token's group; one outside [0, num_groups) is left out.
        num_groups: of the local rows; a row's number is `row_numbers`.
        collectives: what the mesh injects.
    Returns:
        [num_groups], differentiable.
    """
    own_groups = collectives.own_tokens(groups).reshape(-1)
    is_left_out = (own_groups < 0) | (own_groups >= num_groups)
    place = jnp.where(is_left_out, num_groups, own_groups)
    sums = jnp.zeros(num_groups, values.dtype).at[place].add(values.reshape(-1), mode="drop")
    return collectives.sum_over_rows(sums)


def row_numbers(batch: Batch) -> Array:
    """[B, T] the number of each token's row, as `groups` of `sum_by_group`."""
    num_rows, length = batch["tokens"].shape
    return jnp.broadcast_to(jnp.arange(num_rows)[:, None], (num_rows, length))


def document_numbers(batch: Batch, max_documents: int) -> Array:
    """[B, T] a number for each document of each row, as `groups` of `sum_by_group`.

    Args:
        batch: with `segments`, 1 and up for documents and 0 for padding, which belongs to none.
        max_documents: most documents of a row; document d of row r has r * max_documents + d - 1.
    """
    segments = batch["segments"]
    is_document = (segments >= 1) & (segments <= max_documents)
    number = row_numbers(batch) * max_documents + segments - 1
    return jnp.where(is_document, number, -1)
