"""The functions behind a model's heavy operations; a mesh wraps them, a user may name one."""

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxscale.ops import loss, moe
from jaxscale.ops.attention import AttentionContext
from jaxscale.ops.attention import attention as attention_over_own_tokens
from jaxscale.ops.attention.intervals import IntervalAttention, attention_over_intervals
from jaxscale.ops.collectives import Collectives
from jaxscale.ops.draws import Dropout
from jaxscale.ops.embedding import look_up
from jaxscale.ops.loss import Head
from jaxscale.types import Array, Params

# Names what other devices sent. Rematerialisation should keep it: it is as small as a residual, and
# to make it again is an exchange.
EXCHANGED = "exchanged"
# Names a router's logits.
ROUTER = "router"


class Attention(Protocol):
    """Attention over the tokens in `context`, or over those in a cache, whose layout it owns."""

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        context: AttentionContext,
        cache: Any,
    ) -> tuple[Array, Any]:
        """Attends q [B, T, N, H] over k and v [B, T, K, H]: (output [B, T, N, H], cache)."""


class ChunkAttention(Protocol):
    """Attention of one chunk of a sequence over another, for layers that see it chunk by chunk."""

    def __call__(self, q: Array, context: AttentionContext) -> IntervalAttention:
        """What attends queries like `q` [B, T, N, H], with the context's scale and soft-cap."""


class Experts(Protocol):
    """The experts of a mixture, on tokens whose choice is known."""

    def __call__(
        self,
        x: Array,
        index: Array,
        gates: Array,
        weights: Params,
        activation: str,
        slopes: Array | None = None,
        dropout: Dropout | None = None,
    ) -> Array:
        """As `ops.moe.experts`: this device's part of the output, which is yet to be summed."""


class Embed(Protocol):
    """The look-up of tokens."""

    def __call__(self, table: Array, tokens: Array) -> Array:
        """Rows of table [V, D] for tokens [B, T]: [B, own T, D]; 0 for a token outside it."""


class Logits(Protocol):
    """The unembedding."""

    def __call__(
        self,
        h: Array,
        head: Array | Head,
        softcap: float | None,
    ) -> Array:
        """Logits [B, T, V] of h [B, T, D], all of them on every device; not differentiated."""


class TokenLoss(Protocol):
    """The loss of each token without its logits."""

    def __call__(
        self,
        h: Array,
        head: Array | Head,
        labels: Array,
        softcap: float | None,
    ) -> tuple[Array, Array]:
        """(nll, log-normaliser) of the own tokens of h [B, T, D] with labels [B, T].

        nll is 0 for a label outside the vocabulary.
        """


class Name(Protocol):
    """Names a tensor, for rematerialisation policies and for a diagnosis."""

    def __call__(self, path: str, x: Array) -> Array:
        """`x`; a policy knows it by the last part of its path."""


def _embed(table: Array, tokens: Array) -> Array:
    is_known = (tokens >= 0) & (tokens < len(table))
    rows = look_up(table, jnp.clip(tokens, 0, len(table) - 1))
    return jnp.where(is_known[..., None], rows, 0)


def _name(path: str, x: Array) -> Array:
    return checkpoint_name(x, path.rsplit("/", 1)[-1])


@dataclasses.dataclass(frozen=True)
class Backends:
    """What computes; the defaults are the plain functions of one device. See the Protocols."""

    attention: Attention = attention_over_own_tokens
    chunk_attention: ChunkAttention = attention_over_intervals
    experts: Experts = moe.experts
    embed: Embed = _embed
    logits: Logits = loss.unembed
    token_loss: TokenLoss = loss.token_loss
    name: Name = _name


@dataclasses.dataclass(frozen=True)
class Operations:
    """All that a mesh injects into a model: how devices exchange, and what computes."""

    collectives: Collectives = Collectives()
    backends: Backends = Backends()
