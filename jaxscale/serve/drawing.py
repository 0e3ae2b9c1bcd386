"""Draws the next token of many sequences at once, each by settings of its own."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops import by_row
from jaxscale.ops.loss import loss_of_logits
from jaxscale.ops.precision import accumulator
from jaxscale.serve import sampling
from jaxscale.serve.grammar import WORD
from jaxscale.serve.requests import MAX_LOGPROBS, RequestConfig
from jaxscale.types import Array

FIELDS = [
    "temperature",
    "top_k",
    "top_p",
    "top_p_rest",
    "min_p",
    "seed",
    "index",
    "position",
]


@functools.partial(jax.tree_util.register_dataclass, data_fields=FIELDS, meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DrawRows:
    """Settings of each row, as `sampling.SamplingConfig`.

    Args:
        temperature: [R] float32.
        top_k: [R] int32; the size of the vocabulary keeps all.
        top_p: [R] float32.
        top_p_rest: [R] float32, 1 - top_p, of which float32's top_p has lost digits.
        min_p: [R] float32.
        seed: [R] uint32.
        index: [R] int32, which of its request's sequences.
        position: [R] int32, in its sequence, of the token to be drawn.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    top_p_rest: Array
    min_p: Array
    seed: Array
    index: Array
    position: Array


@dataclasses.dataclass(frozen=True)
class DrawKind:
    """What the settings of a batch need, so that nothing else is computed.

    It is static: a GPU that chose by itself would have the host wait for its choice.

    Args:
        has_noise: whether a row has a temperature above 0.
        has_filters: whether such a row has a filter.
        has_logprobs: whether log-probabilities are asked for.
    """

    has_noise: bool = False
    has_filters: bool = False
    has_logprobs: bool = False

    @classmethod
    def of(cls, configs: Iterable[RequestConfig], *, is_scored: bool = False) -> "DrawKind":
        """That of a batch of requests; `is_scored` if it has prompt tokens to be scored."""
        kinds = {config.draws_with for config in configs}
        has_noise, has_filters, has_logprobs = map(any, zip(*kinds, strict=True))
        return cls(has_noise, has_filters, is_scored or has_logprobs)


def draw(logits: Array, rows: DrawRows, kind: DrawKind) -> Array:
    """Draws one token a row, the same that `sampling.sample` draws of it alone.

    Args:
        logits: [R, V].
        rows: how.
        kind: of the batch.
    Returns:
        [R] int32; the lowest of equal maxima where the temperature is 0.
    """
    logits = accumulator(logits)
    if kind.has_noise:
        temperature = jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
        kept = (logits - logits.max(-1, keepdims=True)) / temperature
        kept = _filter(kept, rows) if kind.has_filters else kept
        keys = jax.vmap(_key)(rows.seed, rows.index, rows.position)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
        logits = jnp.where(rows.temperature[:, None] > 0, kept + noise, logits)
    return jnp.argmax(logits, -1).astype(jnp.int32)


def _key(seed: Array, index: Array, position: Array) -> Array:
    """The key of `sampling.token_keys` for one row."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), position)


def _filter(logits: Array, rows: DrawRows) -> Array:
    """The filters of `sampling`, in their order; one that keeps all changes nothing."""
    kept = sampling.top_k(logits, rows.top_k[:, None])
    top_p, min_p = rows.top_p[:, None], rows.min_p[:, None]
    nucleus = sampling.top_p(kept, top_p, rows.top_p_rest[:, None])
    kept = jnp.where(top_p < 1, nucleus, kept)
    return jnp.where(min_p > 0, sampling.min_p(kept, min_p), kept)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["repetition", "presence", "frequency"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PenaltyRows:
    """Penalties of each row, [R] float32, as `requests.Penalties`."""

    repetition: Array
    presence: Array
    frequency: Array


def penalise(
    logits: Array,
    penalties: PenaltyRows,
    is_in_prompt: Array,
    counts: Array,
) -> Array:
    """Takes penalties off logits [R, V].

    Args:
        logits: [R, V].
        penalties: of each row.
        is_in_prompt: [R, V] bool, tokens of the prompts.
        counts: [R, V] int32, how often each token was drawn, the last one included.
    """
    repetition = penalties.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    is_drawn = counts > 0
    logits = jnp.where(is_in_prompt | is_drawn, repeated, logits)
    logits = logits - penalties.presence[:, None] * is_drawn
    return logits - penalties.frequency[:, None] * counts


def only_allowed(logits: Array, masks: Array) -> Array:
    """Logits [R, V], -inf where a token's bit in masks [R, words] int32 is not set."""
    token = jnp.arange(logits.shape[-1])
    bits = (masks[:, token // WORD] >> (token % WORD)) & 1
    return jnp.where(bits == 1, logits, sampling.NEVER)


def log_probabilities(
    logits: Array,
    drawn: Array,
    num_tokens: int,
    *,
    is_invariant: bool = False,
) -> tuple[Array, Array, Array]:
    """Log-probabilities of the tokens drawn and of the most probable ones, as training has them.

    Args:
        logits: [..., R, V] of the whole vocabulary.
        drawn: [..., R] int32.
        num_tokens: only tokens below are among the most probable.
        is_invariant: whether they are added up as in `models.by_row.token_loss`.
    Returns:
        ([..., R] of the tokens drawn, [..., R, MAX_LOGPROBS] of the most probable, which these are,
        int32); fewer where there are fewer tokens.
    """
    totals = (by_row.total,) if is_invariant else ()
    nll, normaliser = loss_of_logits(logits, drawn, *totals)
    top, tokens = lax.top_k(logits[..., :num_tokens], min(MAX_LOGPROBS, num_tokens))
    return -nll, top - normaliser[..., None], tokens.astype(jnp.int32)
