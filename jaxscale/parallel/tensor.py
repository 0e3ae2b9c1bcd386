"""Tensor parallelism with sequence-sharded norms, as operations injected into a single-device model.

Inside the manual region the residual is [B, T / tensor, D]: each token lives on one device. Every collective here is
its own transpose's partner (all-gather and reduce-scatter); a bare psum would have a wrong gradient.

Source: Shoeybi et al. 2019 (arXiv 1909.08053), section 3; Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2.
"""

import jax.numpy as jnp
from jax import lax

from jaxscale.ops.precision import accumulator
from jaxscale.parallel.mesh import AXES, PIPELINE, TENSOR
from jaxscale.types import Array


def enter(x: Array) -> Array:
    """Residual [B, T / tensor, D] to [B, T, D]."""
    return lax.all_gather(x, TENSOR, axis=1, tiled=True)


def exit(y: Array) -> Array:
    """Partial sums [B, T, D] to the residual [B, T / tensor, D]."""
    return lax.psum_scatter(y, TENSOR, scatter_dimension=1, tiled=True)


def own(x: Array) -> Array:
    """[B, T, ...] known to the whole group to this device's tokens [B, T / tensor, ...]."""
    size = x.shape[1] // lax.axis_size(TENSOR)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(TENSOR) * size, size, 1)


def embed(table: Array, tokens: Array) -> Array:
    """Vocabulary-parallel look-up: local table [V / tensor, D], tokens [B, T] to the residual."""
    rows = table.shape[0]
    local = tokens - lax.axis_index(TENSOR) * rows
    is_here = (local >= 0) & (local < rows)
    return exit(jnp.where(is_here[..., None], table[jnp.clip(local, 0, rows - 1)], 0))


def token_loss(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Vocabulary-parallel cross-entropy of the own tokens; local logits [B, T, V / tensor].

    The maximum only steadies the exponentials and carries no gradient.
    """
    logits = accumulator(logits)
    columns = logits.shape[-1]
    top = lax.pmax(lax.stop_gradient(logits.max(-1)), TENSOR)
    is_label = jnp.arange(columns) + lax.axis_index(TENSOR) * columns == labels[..., None]
    sums = jnp.stack([jnp.exp(logits - top[..., None]).sum(-1), jnp.where(is_label, logits, 0).sum(-1)], -1)
    total, label = jnp.moveaxis(exit(sums), -1, 0)
    normaliser = jnp.log(total) + own(top)
    is_known = own((labels >= 0) & (labels < columns * lax.axis_size(TENSOR)))
    return jnp.where(is_known, normaliser - label, 0), normaliser


def total(x: Array) -> Array:
    """Sum over all tokens: over every device of this pipeline stage; the caller has stopped its gradient."""
    return lax.psum(x, tuple(axis for axis in AXES if axis != PIPELINE))
