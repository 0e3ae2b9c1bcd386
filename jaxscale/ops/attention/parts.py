"""What some queries made of some of their keys; parts over other keys add up to the whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxscale.types import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["o", "lse"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Part:
    """What some queries made of the keys that they have seen so far.

    Args:
        o: [B, T, N, H], the softmax over these keys alone, in at least float32.
        lse: [B, N, T] log sum exp of their logits; -inf for a query that saw none.
    """

    o: Array
    lse: Array

    def __add__(self, other: "Part") -> "Part":
        """Over the keys of both.

        Source: Dao 2023 (arXiv 2307.08691), section 3.1.1; the larger lse is taken out of both
            exponentials, so that none overflows.
        """
        lse = jnp.logaddexp(self.lse, other.lse)
        o = _share(self.lse, lse) * self.o + _share(other.lse, lse) * other.o
        return Part(o, lse)


def _share(lse: Array, total: Array) -> Array:
    """[B, T, N, 1] what part of the whole softmax lies in one part's keys; 0 where all saw none."""
    share = jnp.exp(lse - jnp.where(total == -jnp.inf, 0, total))  # -inf - -inf would be NaN
    return jnp.moveaxis(share, 1, 2)[..., None]
