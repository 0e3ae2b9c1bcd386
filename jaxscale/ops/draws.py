"""Random draws of single tokens.

Whatever the mesh, the micro-batches and the layout, a token draws the same numbers. Each number is
a function of the step's key, the token's place in the global batch, the layer and the purpose, and
of nothing else. It is made by a counter-based generator: nothing is stored, and a forward that is
run again draws the same.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.2 (Threefry),
    as JAX has it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from jaxscale.types import Array, Batch

ROUTER, EXPERT, EMBEDDING = PURPOSES = range(3)


def with_token_keys(batch: Batch, key: jax.Array) -> Batch:
    """The batch with `token_keys` [B, T, 2] uint32, from which a loss draws.

    A batch without them is for evaluation.

    Args:
        batch: the global batch, leaves [B, T] or [B, T, ...].
        key: typed PRNG key of the step.
    """
    shape = next(iter(batch.values())).shape[:2]
    num_tokens = shape[0] * shape[1]
    place = jnp.arange(num_tokens, dtype=jnp.uint32).reshape(shape)
    token_keys = scramble(jax.random.key_data(key), place, 0)
    return {**batch, "token_keys": token_keys}


def scramble(
    keys: Array,
    first: Array | int,
    second: Array | int,
) -> Array:
    """Threefry-2x32: two words of key and two of a counter to two random words.

    Args:
        keys: [..., 2] uint32.
        first, second: [...] uint32, broadcast against `keys[..., 0]` and one another.
    Returns:
        [..., 2] uint32.
    """
    key_words = keys[..., 0], keys[..., 1]
    counter_words = jnp.asarray(first, jnp.uint32), jnp.asarray(second, jnp.uint32)
    words = jnp.broadcast_arrays(*key_words, *counter_words)
    return jnp.stack(threefry2x32_p.bind(*words), -1)


def uniform(words: Array) -> Array:
    """Random words, uint32, to float32 above 0 and below 1.

    The steps are of 2^-23: with one bit more the largest word would be rounded up to 1.
    """
    steps = (words >> 9).astype(jnp.float32)
    return (steps + 0.5) * 2.0**-23


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "layer"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Draws:
    """What the tokens of one layer draw in training.

    Args:
        keys: [B, T, 2] uint32, the batch's `token_keys`.
        layer: [] number of the layer in the model.
    """

    keys: Array
    layer: Array | int = 0

    def numbers(self, purpose: int, num: int) -> Array:
        """Numbers above 0 and below 1, [B, T, num] float32."""
        num_streams = -(-num // 2)
        words = self.streams(purpose, jnp.arange(num_streams))
        words = words.reshape(*words.shape[:-2], -1)
        return uniform(words[..., :num])

    def streams(self, purpose: int, number: Array) -> Array:
        """Two random words for each number [..., n]: [B, T, n, 2] uint32.

        They may be keys of further draws.
        """
        stream = jnp.asarray(self.layer, jnp.uint32) * len(PURPOSES) + purpose
        return scramble(self.keys[..., None, :], stream, number)

    def at(self, layer: Array | int) -> "Draws":
        """The draws of another layer."""
        return dataclasses.replace(self, layer=layer)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "first"],
    meta_fields=["rate"],
)
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Zeroes each element of a vector with a probability, and divides the others by what is left.

    Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from
        overfitting", section 4.
    Args:
        keys: [..., 2] uint32, one key a vector.
        rate: the probability; the others are divided by 1 - rate.
        first: number of the first element, of vectors that are part of a longer one.
    """

    keys: Array
    rate: float
    first: Array | int = 0

    def __call__(self, x: Array) -> Array:
        """`x` [..., F] with elements dropped; one Threefry block an element."""
        element = jnp.arange(x.shape[-1], dtype=jnp.uint32)
        element = jnp.asarray(self.first, jnp.uint32) + element
        words = scramble(self.keys[..., None, :], element, 0)
        is_dropped = uniform(words[..., 0]) < self.rate
        return jnp.where(is_dropped, 0, x / (1 - self.rate))
