"""Draws the next token of many sequences at once, each by settings of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.ops.precision import accumulator
from jaxscale.serve import sampling
from jaxscale.serve.grammar import WORD
from jaxscale.serve.requests import MAX_LOGPROBS
from jaxscale.types import Array

FIELDS = [
    "temperature",
    "top_k",
    "top_p",
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
        min_p: [R] float32.
        seed: [R] uint32.
        index: [R] int32, which of its request's sequences.
        position: [R] int32, in its sequence, of the token to be drawn.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    seed: Array
    index: Array
    position: Array


def draw(logits: Array, rows: DrawRows) -> Array:
    """Draws one token a row, the same that `sampling.sample` draws of it alone.

    Args:
        logits: [R, V].
        rows: how.
    Returns:
        [R] int32; the lowest of equal maxima where the temperature is 0.
    Cost: rows that only take the maximum are spared the noise, rows without filters the sort, as
        long as all of the batch are such.
    """
    logits = accumulator(logits)

    def with_noise(logits: Array) -> Array:
        temperature = jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
        scaled = (logits - logits.max(-1, keepdims=True)) / temperature
        is_filtered = (rows.top_k < logits.shape[-1]) | (rows.top_p < 1) | (rows.min_p > 0)
        kept = lax.cond(is_filtered.any(), lambda x: _filter(x, rows), lambda x: x, scaled)
        keys = jax.vmap(_key)(rows.seed, rows.index, rows.position)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
        return jnp.where(rows.temperature[:, None] > 0, kept + noise, logits)

    logits = lax.cond((rows.temperature > 0).any(), with_noise, lambda x: x, logits)
    return jnp.argmax(logits, -1).astype(jnp.int32)


def _key(seed: Array, index: Array, position: Array) -> Array:
    """The key of `sampling.token_keys` for one row."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), position)


def _filter(logits: Array, rows: DrawRows) -> Array:
    """The filters of `sampling`, in their order; one that keeps all changes nothing."""
    kept = sampling.top_k(logits, rows.top_k[:, None])
    top_p, min_p = rows.top_p[:, None], rows.min_p[:, None]
    kept = jnp.where(top_p < 1, sampling.top_p(kept, top_p), kept)
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


def log_probabilities(logits: Array, drawn: Array) -> tuple[Array, Array, Array]:
    """Log-probabilities of the tokens drawn and of the most probable ones.

    Args:
        logits: [R, V].
        drawn: [R] int32.
    Returns:
        ([R] of the tokens drawn, [R, MAX_LOGPROBS] of the most probable, [R, MAX_LOGPROBS] int32
        which these are); fewer where the vocabulary is smaller.
    """
    logprobs = jax.nn.log_softmax(accumulator(logits))
    top, tokens = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    of_drawn = jnp.take_along_axis(logprobs, drawn[:, None], -1)[:, 0]
    return of_drawn, top, tokens.astype(jnp.int32)
