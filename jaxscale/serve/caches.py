"""The contiguous caches of all layers of a decoder."""

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
