"""Draws the next token from logits: temperature, top-k, top-p and min-p, in this order."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxscale.ops.precision import accumulator
from jaxscale.types import Array, InputError, check_positive, check_types

NEVER = -jnp.inf
MAX_SEED = 2**32 - 1
# Beyond them, dividing logits would leave float32: NaN is drawn then, whatever a grammar forbids.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn; each filter sees the distribution that the one before it left.

    Args:
        temperature: divides the logits; 0 takes the arg max.
        top_k: keep the k most probable tokens; None keeps all.
        top_p: keep the smallest set of most probable tokens whose probability is at least this; 1
            keeps all.
        min_p: keep the tokens at least this probable relative to the most probable; 0 keeps all.
        seed: all draws derive from it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            expected = f"0 (greedy) or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
            raise InputError("SamplingConfig.temperature", self.temperature, expected)
        if self.top_k is not None:
            check_positive("SamplingConfig.top_k", self.top_k)
        if not 0 < self.top_p <= 1:
            raise InputError("SamplingConfig.top_p", self.top_p, "0 < top_p <= 1")
        if not 0 <= self.min_p <= 1:
            raise InputError("SamplingConfig.min_p", self.min_p, "0 <= min_p <= 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError("SamplingConfig.seed", self.seed, f"0 <= seed <= {MAX_SEED}")


def token_keys(
    key: Array,
    sequences: Array,
    positions: Array,
) -> Array:
    """The key of each draw, made of the run's key, the sequence and the position, not the batch.

    Args:
        key: [] typed PRNG key of the run.
        sequences: [B] int32, number of each sequence in the run.
        positions: [B] int32, position in its sequence of the token to be drawn.
    Returns:
        [B] typed PRNG keys.
    """
    return jax.vmap(lambda s, p: jax.random.fold_in(jax.random.fold_in(key, s), p))(
        sequences, positions
    )


def sample(
    logits: Array,
    keys: Array,
    config: SamplingConfig,
) -> Array:
    """Draws one token a row by the Gumbel maximum.

    Source: the Gumbel-max trick, Maddison et al. 2014 (arXiv 1411.0030), section 2.
    Args:
        logits: [B, V].
        keys: [B] typed PRNG keys; unused when the temperature is 0.
        config: how to draw.
    Returns:
        [B] int32; among equal maxima the lowest token.
    """
    logits = accumulator(logits)
    if config.temperature > 0:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
        logits = filter_logits(logits, config) + noise
    return jnp.argmax(logits, -1).astype(jnp.int32)


def filter_logits(logits: Array, config: SamplingConfig) -> Array:
    """Applies the temperature and the filters.

    Args:
        logits: [B, V] in at least float32.
        config: its temperature is above 0.
    Returns:
        [B, V], -inf where a token is filtered out; the arg max never is.
    """
    logits = (logits - logits.max(-1, keepdims=True)) / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        logits = top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = top_p(logits, config.top_p)
    return min_p(logits, config.min_p) if config.min_p > 0 else logits


def top_k(logits: Array, k: int) -> Array:
    """Keeps exactly k tokens, of equal ones the lowest.

    Source: Fan et al. 2018 (arXiv 1805.04833), section 5.4.
    Args:
        logits: [B, V].
        k: of all rows.
    Returns:
        [B, V], -inf for the other tokens.
    """
    return jnp.where(_ranks(logits) < k, logits, NEVER)


def top_p(
    logits: Array,
    p: float | Array,
    rest: float | Array | None = None,
) -> Array:
    """Keeps the smallest set of most probable tokens with total probability >= p.

    Of equal ones the lowest comes first.

    Source: Holtzman et al. 2019 (arXiv 1904.09751), equation 2.
    Args:
        logits: [B, V].
        p: of all rows, or [B, 1].
        rest: 1 - p, where p is an array of float32, from which it could not be taken exactly.
    Returns:
        [B, V], -inf for the other tokens.
    """
    probabilities = jax.nn.softmax(logits)
    descending = -jnp.sort(-probabilities, -1)
    # A token stays if those before it hold less than p: if it and those after it hold more than
    # 1 - p. A float32 sum near 1 loses small numbers, so the sum that is far from 1 is taken.
    before = jnp.cumsum(descending, -1) - descending
    after = jnp.flip(jnp.cumsum(jnp.flip(descending, -1), -1), -1)
    of_rest = after > (1 - p if rest is None else rest) * after[..., :1]
    # A p that is 0 in float32 keeps the most probable token too.
    is_kept = jnp.where(p <= 0.5, before < jnp.maximum(p, jnp.finfo(before).tiny), of_rest)
    return jnp.where(jnp.take_along_axis(is_kept, _ranks(logits), -1), logits, NEVER)


def min_p(logits: Array, p: float) -> Array:
    """Keeps the tokens whose probability is at least p times the most probable one's.

    Source: Nguyen et al. 2024 (arXiv 2407.01082), section 3.
    Args:
        logits: [B, V].
        p: of all rows, above 0.
    Returns:
        [B, V], -inf for the other tokens.
    """
    return jnp.where(logits >= logits.max(-1, keepdims=True) + jnp.log(p), logits, NEVER)


def _ranks(logits: Array) -> Array:
    """The place of each token in descending order, equal ones in order of their number."""
    return jnp.argsort(jnp.argsort(-logits, -1, stable=True), -1)
