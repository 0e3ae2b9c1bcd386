"""Where the tokens of a sequence lie among the shards of the `sequence` axis."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.parallel.mesh import SEQUENCE, check_multiple
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
        num_shards = lax.axis_size(SEQUENCE)
        shard = lax.axis_index(SEQUENCE)

        def permuted(x: Array) -> Array:
            gathered = lax.all_gather(x, SEQUENCE, axis=1, tiled=True)
            order = zigzag_order(gathered.shape[1], self.ring)
            by_shard = jnp.asarray(order.reshape(num_shards, -1))
            return jnp.take(gathered, by_shard[shard], axis=1)

        return jax.tree.map(permuted, batch)


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
