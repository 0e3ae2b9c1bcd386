"""The loss of a bidirectional model: the tokens that were hidden from it."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxscale.models.losses import NextTokenLoss
from jaxscale.ops.backends import Operations
from jaxscale.ops.draws import EMBEDDING, Draws
from jaxscale.types import Array, Batch, InputError, Params

REPLACED, OTHER = 0.8, 0.1  # shares of the hidden tokens; the rest stay as they are
EVERY = 7  # of the tokens that are hidden where nothing is drawn


@dataclasses.dataclass(frozen=True)
class MaskedTokenLoss(NextTokenLoss):
    """Cross-entropy of tokens that are replaced in the input.

    Of the hidden tokens 80 % become the mask token, 10 % another token, and 10 % stay. Where
    nothing is drawn, as in evaluation, every seventh position of a document is hidden and becomes
    the mask token.

    Source: Devlin et al. 2018, BERT (arXiv 1810.04805), section 3.1, task 1.
    Args:
        mask_id: the token that stands for a hidden one.
        fraction: of the tokens that are hidden in training.
    """

    mask_id: int = 0
    fraction: float = 0.15

    def __post_init__(self):
        if self.model.is_causal:
            expected = "False for hidden tokens, which those after them help to find"
            raise InputError("ModelConfig.is_causal", True, expected)
        if not 0 <= self.mask_id < self.model.vocab_size:
            expected = f"a token below vocab_size = {self.model.vocab_size}"
            raise InputError("masked_token_loss.mask_id", self.mask_id, expected)
        if not 0 < self.fraction < 1:
            raise InputError("masked_token_loss.fraction", self.fraction, "0 < fraction < 1")

    def start(self, params: Params, batch: Batch, *, operations: Operations) -> Array:
        """As `NextTokenLoss.start`, of the tokens with some of them hidden."""
        tokens, _ = self.hidden(batch)
        return super().start(params, batch | {"tokens": tokens}, operations=operations)

    def finish(
        self,
        params: Params,
        x: Array,
        batch: Batch,
        *,
        operations: Operations,
    ) -> tuple[Array, Array, dict[str, Array]]:
        """As `NextTokenLoss.finish`, of the hidden tokens."""
        _, is_hidden = self.hidden(batch)
        labels = {"labels": batch["tokens"], "weights": batch["weights"] * is_hidden}
        return super().finish(params, x, batch | labels, operations=operations)

    def hidden(self, batch: Batch) -> tuple[Array, Any]:
        """(the tokens as the model sees them, whether each is hidden), [B, T] each."""
        tokens = batch["tokens"]
        if "token_keys" not in batch:
            is_hidden = batch["positions"] % EVERY == EVERY - 1
            return jnp.where(is_hidden, self.mask_id, tokens), is_hidden
        # As of a layer after the last, whose draws are no other's.
        draws = Draws(batch["token_keys"], self.model.num_layers).numbers(EMBEDDING, 3)
        is_hidden, kind = draws[..., 0] < self.fraction, draws[..., 1]
        other = (draws[..., 2] * self.model.vocab_size).astype(tokens.dtype)
        seen = jnp.where(kind < REPLACED, self.mask_id, tokens)
        seen = jnp.where((kind >= REPLACED) & (kind < REPLACED + OTHER), other, seen)
        return jnp.where(is_hidden, seen, tokens), is_hidden
