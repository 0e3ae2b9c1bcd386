"""Where the tokens of a sequence lie among the shards of the `sequence` axis."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.parallel.mesh import SEQUENCE, TENSOR, check_multiple
from jaxscale.types import Array, Batch


class TokenLayout(Protocol):
    """Which tokens of a sequence each shard of the `sequence` axis has.

    A batch comes in contiguous shards and is laid out once a step. What is kept for each token,
    such as its label, weight and position, lies where the token lies, so that only attention needs
    to know the layout.
    """

    def place(self, batch: Batch) -> Batch:
        """Lays a batch out; called inside the manual region.

        Args:
            batch: local arrays [b, T / sequence], contiguous shards of [b, T].
        Returns:
            The same tokens, sharded as the layout has them, [b, T / sequence].
        """


@dataclasses.dataclass(frozen=True)
class Contiguous:
    """Each shard has consecutive tokens, in the order of the sequence."""

    def place(self, batch: Batch) -> Batch:
        """Returns the batch unchanged: it comes so."""
        return batch


@dataclasses.dataclass(frozen=True)
class Zigzag:
    """The shards of a ring: each member has a chunk from either end of the sequence.

    Source: Llama 3 (arXiv 2407.21783), section 3.3.2.
    Args:
        ring: members.
    """

    ring: int

    def place(self, batch: Batch) -> Batch:
        """Permutes the tokens into `zigzag_order`.

        Raises:
            InputError: T % (2 * ring) != 0.
        Cost: one all-gather of [b, T] for each array.
        """
        return _place(batch, lambda length: zigzag_order(length, self.ring))


@dataclasses.dataclass(frozen=True)
class Chunked:
    """Chunks of the sequence one after the other, each shared out among all shards.

    The all-to-all of a chunk then yields consecutive tokens. A shard's tokens of a chunk are
    shared out among its tensor group in the same way.

    Source: Yao et al. 2024, FPDT (arXiv 2408.16978), section 5.2.
    Args:
        chunk_tokens: C, dividing T.
    """

    chunk_tokens: int

    def place(self, batch: Batch) -> Batch:
        """Permutes the tokens into `chunk_order`.

        Raises:
            InputError: T % chunk_tokens != 0.
        Cost: one all-gather of [b, T] for each array; nothing where nothing is shared out.
        """
        shards, tensor = lax.axis_size(SEQUENCE), lax.axis_size(TENSOR)
        if shards * tensor == 1:
            return batch

        def order(length: int) -> np.ndarray:
            size = self.chunk_tokens
            remainder = "sequence_length % chunk_tokens"
            check_multiple("DataConfig.sequence_length", length, size, remainder, str(size))
            return chunk_order(length, length // self.chunk_tokens, shards, tensor)

        return _place(batch, order)


def _place(batch: Batch, order_of: Callable[[int], np.ndarray]) -> Batch:
    """The tokens of a batch, in contiguous shards, in another order; T -> [T], shard by shard."""
    shards, shard = lax.axis_size(SEQUENCE), lax.axis_index(SEQUENCE)

    def permuted(x: Array) -> Array:
        gathered = lax.all_gather(x, SEQUENCE, axis=1, tiled=True)
        order = order_of(gathered.shape[1])
        by_shard = jnp.asarray(order.reshape(shards, -1))
        return jnp.take(gathered, by_shard[shard], axis=1)

    return jax.tree.map(permuted, batch)


def chunk_order(
    length: int,
    num_chunks: int,
    shards: int,
    tensor: int,
) -> np.ndarray:
    """The token in each place: shard by shard, in each member by member, in each chunk by chunk.

    Args:
        length: T, a multiple of num_chunks * shards * tensor.
        num_chunks: of the sequence.
        shards: of the sequence.
        tensor: members of a tensor group.
    Returns:
        [T] index into the sequence.
    """
    parts = np.arange(length).reshape(num_chunks, shards, tensor, -1)
    return parts.transpose(1, 2, 0, 3).reshape(-1)


def zigzag_order(length: int, ring: int) -> np.ndarray:
    """The token in each place: of 2 * ring chunks, member i has chunks i and 2 * ring - 1 - i.

    Causal attention over the keys of another member then costs every member as much, whichever
    member it is.

    Args:
        length: T.
        ring: members.
    Returns:
        [T] index into the sequence, member by member.
    Raises:
        InputError: T % (2 * ring) != 0.
    """
    num_chunks = 2 * ring
    check_multiple(
        "DataConfig.sequence_length",
        length,
        num_chunks,
        "sequence_length % (2 * ring)",
        f"(2 * {ring})",
    )
    chunks = np.arange(length).reshape(num_chunks, -1)
    from_both_ends = [(i, num_chunks - 1 - i) for i in range(ring)]
    return chunks[np.array(from_both_ends)].reshape(-1)
