"""Where the engine's programs run: on one device, or spread over a tensor group."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import BatchInvariant, ExecutionConfig, Whole
from jaxscale.models.lora import Adapters
from jaxscale.ops.attention.invariant import KEY_BLOCK
from jaxscale.ops.attention.paged_cache import PagedCache, empty_pages
from jaxscale.parallel.mesh import TENSOR
from jaxscale.parallel.region import Region
from jaxscale.tree import flatten
from jaxscale.types import InputError, Params

EVERYWHERE = PartitionSpec()
PAGES = PartitionSpec(None, None, TENSOR)  # [pages, S of a page, K, H], and without H


@dataclasses.dataclass(frozen=True)
class Placement:
    """A model and the devices that share it.

    Args:
        decoder: with unrolled layers, so that each layer's pages are an array of their own and
            are written in place; bound to the operations of `region`, if there is one.
        region: of a mesh whose only axis is tensor, see `parallel.region.make_serving_operations`;
            None for one device.
    """

    decoder: Decoder
    region: Region | None = None

    @property
    def tensor(self) -> int:
        """Members of the tensor group."""
        return 1 if self.region is None else self.region.mesh.shape[TENSOR]

    @property
    def invariant(self) -> BatchInvariant | None:
        """The strategy of a model whose bits do not depend on the batch; None for others."""
        execution = self.decoder.execution
        return execution.strategy if execution.is_batch_invariant else None

    def prepare(self, params: Params) -> Params:
        """The parameters as forwards take them, see `Decoder.prepared`."""
        prepare = self.decoder.prepared
        if self.region is not None:
            prepare = self.region.forward(prepare, in_specs=(), out_specs=self._param_specs())
        return jax.jit(prepare)(params)

    def empty_caches(
        self,
        num_pages: int,
        page_size: int,
        dtype: str,
    ) -> dict[str, Any]:
        """Pages of all layers, of which each member makes those of its kv heads alone."""
        shapes = self._of_layers(lambda heads, width: (num_pages, page_size, heads, width))

        def make() -> dict[str, Any]:
            return jax.tree.map(lambda each: empty_pages(*each, dtype), shapes, is_leaf=_is_shape)

        if self.region is None:
            return make()
        # No device has room for the pages of all members, not even for a moment.
        return jax.jit(make, out_shardings=NamedSharding(self.region.mesh, PAGES))()

    def spread(self, forward: Callable) -> Callable:
        """`forward(params, caches, last tokens, packed) -> (logits, rows, caches)` on all."""
        if self.region is None:
            return forward
        pages = self._of_layers(lambda *_: PagedCache(PAGES, PAGES))
        return jax.shard_map(
            forward,
            mesh=self.region.mesh,
            in_specs=(self._param_specs(), pages, EVERYWHERE, EVERYWHERE),
            out_specs=(EVERYWHERE, EVERYWHERE, pages),
            check_vma=False,
        )

    def everywhere(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Zeros of which every member has all."""
        zeros = jnp.zeros(shape, dtype)
        if self.region is None:
            return zeros
        return jax.device_put(zeros, NamedSharding(self.region.mesh, EVERYWHERE))

    def _of_layers(self, make: Callable) -> dict[str, Any]:
        """make(kv heads, H) of each layer, in the form of caches for `Decoder.run_layers`."""
        config = self.decoder.config

        def of(layers: Any) -> dict[str, Any]:
            # A member of a group larger than the number of kv heads has a copy of one of them.
            heads = [layer.attention for layer in layers]
            return {
                str(i): make(max(each.num_kv_heads, self.tensor), each.head_dim)
                for i, each in enumerate(heads)
            }

        periods = tuple(of(config.pattern) for _ in range(config.num_periods))
        return {"prefix": of(config.prefix), "layers": periods}

    def _param_specs(self) -> Any:
        """Of `Decoder.prepared`'s tree, in which the layers are apart."""
        specs = dict(self.region.specs.parameters)
        layers = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs["layers"])
        return specs | {"layers": (layers,) * self.decoder.config.num_periods}


def make_placement(
    decoder: Decoder,
    region: Region | None,
    *,
    block_size: int,
    cache_dtype: str | None = None,
) -> Placement:
    """A model as the engine runs it: its layers unrolled, its strategy kept if bits depend on it.

    Args:
        decoder: the model.
        region: as in `Placement`.
        block_size: tokens a page.
        cache_dtype: of keys and values; None for the compute type.
    Raises:
        InputError: with the strategy BatchInvariant there are several devices, adapters, layouts of
            blocks, a cache of 8 bits, or pages that are no blocks of keys.
    """
    execution = decoder.execution
    strategy = execution.strategy if execution.is_batch_invariant else Whole()
    execution = ExecutionConfig(is_scanned=False, remat="none", strategy=strategy)
    placement = Placement(dataclasses.replace(decoder, execution=execution), region)
    if placement.invariant is None:
        return placement
    if region is not None:
        expected = "one device with the strategy BatchInvariant"
        raise InputError("tensor", placement.tensor, expected)
    if decoder.config.lora is not None:
        expected = "None with the strategy BatchInvariant: merge the adapters first"
        raise InputError("ModelConfig.lora", decoder.config.lora, expected)
    if any(layer.attention.layout for layer in decoder.config.layers):
        expected = "None with the strategy BatchInvariant"
        raise InputError("AttentionConfig.layout", "a layout of blocks", expected)
    if cache_dtype is not None:
        expected = "None with the strategy BatchInvariant"
        raise InputError("EngineConfig.cache_dtype", cache_dtype, expected)
    if block_size != KEY_BLOCK:
        expected = f"{KEY_BLOCK} with the strategy BatchInvariant, whose blocks of keys these are"
        raise InputError("EngineConfig.block_size", block_size, expected)
    return placement


def check_adapters(placement: Placement, adapters: Mapping[str, Adapters]) -> None:
    """Raises InputError for adapters by request where they cannot be used."""
    if not adapters:
        return
    expected = "none with a tensor group, the strategy BatchInvariant or a model with adapters"
    is_alone = placement.region is None and placement.invariant is None
    if not is_alone or placement.decoder.config.lora is not None:
        raise InputError("adapters", list(adapters), expected)


def shapes_of(params: Params) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its path."""
    return {path: jnp.shape(leaf) for path, leaf in flatten(params).items()}


def check_shapes(params: Params, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises InputError for parameters of another model than those with the expected shapes."""
    found = shapes_of(params)
    for path in (*expected, *found):
        if found.get(path) != expected.get(path):
            wanted = f"{expected.get(path, 'no such parameter')}, as the engine has it"
            raise InputError(f"params: {path}", found.get(path), wanted)


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and isinstance(value[0], int)
