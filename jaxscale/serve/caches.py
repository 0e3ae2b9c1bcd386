"""The contiguous caches of all layers of a decoder."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.models.decoder import Decoder
from jaxscale.ops.attention import cache as kv_cache
from jaxscale.types import Array


def empty_caches(
    decoder: Decoder,
    batch_size: int,
    capacity: int,
    tensor: int = 1,
) -> dict[str, Any]:
    """Caches for `Decoder.run_layers`.

    Args:
        decoder: the model.
        batch_size: rows.
        capacity: slots a row.
        tensor: members of a tensor group, each of which has a share of the kv heads.
    Returns:
        One cache for each layer of the prefix; and for the stack one for each position of the
        pattern, with a leading dim of periods, or a tuple of the periods' where layers are
        unrolled.
    """
    config, dtype = decoder.config, decoder.policy.compute

    def of_layer(layer: Any) -> kv_cache.KVCache:
        # A member of a group larger than the number of kv heads has one of them.
        num_kv_heads = max(layer.attention.num_kv_heads // tensor, 1)
        head_dim = layer.attention.head_dim
        return kv_cache.empty_cache(batch_size, capacity, num_kv_heads, head_dim, dtype)

    def of_period() -> dict[str, kv_cache.KVCache]:
        return {str(i): of_layer(layer) for i, layer in enumerate(config.pattern)}

    prefix = {str(i): of_layer(layer) for i, layer in enumerate(config.prefix)}
    if not decoder.execution.is_scanned:
        return {"prefix": prefix, "layers": tuple(of_period() for _ in range(config.num_periods))}

    def stacked(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (config.num_periods, *leaf.shape))

    return {"prefix": prefix, "layers": jax.tree.map(stacked, of_period())}


def slots_once(caches: Any) -> Any:
    """The caches, of which the first of a single layer alone has positions, segments and length.

    They are equal in all layers. Carried by each, they would take four small kernels a layer in
    every step.
    """
    leaves, structure = jax.tree.flatten(caches, is_leaf=_is_cache)
    is_first = True
    for i, cache in enumerate(leaves):
        if cache.length.ndim:  # of a stack of layers
            continue
        if not is_first:
            leaves[i] = dataclasses.replace(cache, positions=None, segments=None, length=None)
        is_first = False
    return structure.unflatten(leaves)


def slots_everywhere(caches: Any) -> Any:
    """The caches that `slots_once` was given."""
    leaves, structure = jax.tree.flatten(caches, is_leaf=_is_cache)
    single = [each for each in leaves if each.length is not None and not each.length.ndim]
    for i, cache in enumerate(leaves):
        if cache.length is None:
            leaves[i] = dataclasses.replace(single[0], k=cache.k, v=cache.v)
    return structure.unflatten(leaves)


def _is_cache(leaf: Any) -> bool:
    return isinstance(leaf, kv_cache.KVCache)
