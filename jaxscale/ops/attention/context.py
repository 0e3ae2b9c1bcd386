"""Who may attend to whom: the structure of an attention mask, which every backend reads."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.kernels.attention.tiles import BLOCK, BlockLayout
from jaxscale.types import Array

# Finite, so that the softmax of a row without any visible key is finite too. Nobody reads it.
NEVER = -1e30


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "segments", "key_positions", "key_segments", "lengths"],
    meta_fields=["window", "softcap", "scale", "is_causal", "layout"],
)
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """The mask: a query sees keys of its own segment; if causal, at positions (p - window, p].

    Args:
        positions: [B, T] position of each query within its document, rising along T.
        segments: [B, T] document number, 0 for padding; None when a row is one document. Without
            segments Ulysses assumes that all rows have the same positions, so whoever pads rows
            on a mesh must give segments.
        key_positions: [B, S] positions of the keys, negative where a slot is empty; None when the
            keys are the queries' own tokens in the same order, which backends may rely on.
        key_segments: [B, S] or None, as `segments`.
        lengths: [B, T] tokens of each query's whole document, for rotary positions that depend on
            it; None where none do.
        window: number of keys that a query of a causal mask sees, its own included; None for all.
        softcap: c in c * tanh(logits / c); None for none.
        scale: factor on the logits; None for 1 / sqrt(H).
        is_causal: whether a query sees no later key.
        layout: which blocks of BLOCK positions each head of a causal mask sees; None for all.
    """

    positions: Array
    segments: Array | None = None
    key_positions: Array | None = None
    key_segments: Array | None = None
    lengths: Array | None = None
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    is_causal: bool = True
    layout: BlockLayout | None = None

    @property
    def is_aligned(self) -> bool:
        """Whether the keys are the queries' own tokens in the same order."""
        return self.key_positions is None

    def logits_scale(self, head_dim: int) -> float:
        """The factor on the logits of heads of `head_dim`."""
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale

    def mask(self, num_heads: int = 1) -> Array:
        """The dense mask, True where a query may see a key.

        Returns:
            [B, 1, T, S], or [B, N, T, S] where a layout of blocks makes heads differ.
        """
        key_positions = self.positions if self.is_aligned else self.key_positions
        key_segments = self.segments if self.is_aligned else self.key_segments
        distance = self.positions[:, :, None] - key_positions[:, None, :]
        visible = (key_positions >= 0)[:, None, :]
        if self.is_causal:
            visible = visible & (distance >= 0)
        if self.window is not None:
            visible = visible & (distance < self.window)
        if self.segments is not None:
            visible = visible & (self.segments[:, :, None] == key_segments[:, None, :])
        visible = jnp.broadcast_to(visible, distance.shape)[:, None]
        if self.layout is None:
            return visible
        num_blocks = -(-max(distance.shape[1:]) // BLOCK)
        sees = jnp.asarray(self.layout.sees(num_blocks))
        query_block = self.positions[:, :, None] // BLOCK
        key_block = key_positions[:, None, :] // BLOCK
        by_pattern = jnp.moveaxis(sees[:, query_block, key_block], 0, 1)
        return visible & by_pattern[:, jnp.arange(num_heads) % self.layout.stride]

    def key_intervals(self) -> tuple[Array, Array]:
        """The keys that each token of an aligned context sees: low <= s < high, in token order.

        Returns:
            (low, high), [B, T] int32 each.
        """
        length = self.positions.shape[1]
        token = jnp.arange(length, dtype=jnp.int32)
        low = jnp.zeros_like(token)[None]
        high = jnp.full_like(token, length)[None]
        if self.segments is not None:
            changes = self.segments[:, 1:] != self.segments[:, :-1]
            is_first = jnp.pad(changes, ((0, 0), (1, 0)))
            is_last = jnp.pad(changes, ((0, 0), (0, 1)))
            low = lax.cummax(jnp.where(is_first, token, 0), axis=1)
            high = lax.cummin(jnp.where(is_last, token + 1, length), axis=1, reverse=True)
        if self.window is not None:
            low = jnp.maximum(low, token - self.window + 1)
        if self.is_causal:
            high = token + 1
        return low, jnp.broadcast_to(high, low.shape)
