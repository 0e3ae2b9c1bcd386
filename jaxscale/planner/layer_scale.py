"""Layers of a decoder, measured on a device: how much longer they take than the model says."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxscale.models.config import LayerConfig, ModelConfig
from jaxscale.models.decoder import Decoder
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.parameters import abstract_params, parameter_table
from jaxscale.ops.loss import sum_over_chunks
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.planner.decoder import LayerWork, layer_work
from jaxscale.planner.job import Job
from jaxscale.planner.layer_time import LayerClock
from jaxscale.planner.timing import BlockTimes, Seconds
from jaxscale.types import Array, Batch, Params, RunError


class OutOfMemory(RunError):
    """A layer ran out of memory when it was measured; a layout that needs it is impossible."""


class LayerScale(Protocol):
    """Factors on the modelled seconds of what a device computes by itself."""

    def layer(
        self,
        work: LayerWork,
        tokens: float,
        remat: str,
        mesh: MeshConfig,
    ) -> Seconds:
        """Factors on a layer's forward and backward; see `LayerClock.layer`."""

    def head(self, tokens: float, tensor: int) -> float:
        """The factor on the unembedding with its loss; see `LayerClock.head`."""


class AsModelled:
    """Nothing is measured."""

    def layer(
        self,
        work: LayerWork,
        tokens: float,
        remat: str,
        mesh: MeshConfig,
    ) -> Seconds:
        """As `LayerScale`."""
        return Seconds(1.0, 1.0)

    def head(self, tokens: float, tensor: int) -> float:
        """As `LayerScale`."""
        return 1.0


class MeasuredLayers:
    """Runs one layer of each kind with as many tokens as a device has of a micro-batch.

    A tensor group's share of a layer is a layer with a share of the heads and of the hidden dims.
    A sequence group's share is whole rows, fewer of them, for which attention has as much to do.

    Args:
        job: what is trained.
        times: where blocks run, each distinct one once.
        clock: what the model says.
    Raises:
        OutOfMemory: by `layer` and `head`.
    """

    def __init__(self, job: Job, times: BlockTimes, clock: LayerClock):
        self.job, self.times, self.clock = job, times, clock
        self._layers: dict[tuple, Seconds] = {}
        self._heads: dict[tuple, float] = {}

    def layer(
        self,
        work: LayerWork,
        tokens: float,
        remat: str,
        mesh: MeshConfig,
    ) -> Seconds:
        """As `LayerScale`."""
        key = (work, self._rows(tokens), remat, mesh.tensor)
        if key not in self._layers:
            self._layers[key] = self._layer(*key)
        return self._layers[key]

    def head(self, tokens: float, tensor: int) -> float:
        """As `LayerScale`."""
        key = (self._rows(tokens), tensor)
        if key not in self._heads:
            self._heads[key] = self._head(*key)
        return self._heads[key]

    def _rows(self, tokens: float) -> int:
        return max(1, round(tokens / self.job.length))

    def _layer(
        self,
        work: LayerWork,
        rows: int,
        remat: str,
        tensor: int,
    ) -> Seconds:
        job = self.job
        share = share_of_layer(job.layer_of(work), tensor)
        model = dataclasses.replace(job.model, pattern=(share,), prefix=(), num_layers=1)
        execution = dataclasses.replace(job.execution, is_scanned=False, remat=remat)
        params = abstract_params(parameter_table(model)["layers"], job.policy.parameters)
        keys = jax.ShapeDtypeStruct((rows, job.length, 2), jnp.uint32)

        def forward(params: Params, x: Array, keys: Array) -> tuple:
            decoder = self._decoder(model, execution)
            tokens = decoder.tokens({**self._batch(rows), "token_keys": keys})
            x, _, sums = decoder.run_stack(params, x, tokens)
            return x, sums

        found = self._timed(
            f"a layer with {rows} rows", forward, params, self._residual(rows), keys
        )
        of_share = layer_work(model, share, job.length)
        modelled = self.clock.layer(of_share, rows * job.length, remat, MeshConfig()).sum(1)
        return Seconds(found.forward / modelled[0], found.backward / modelled[1:].sum())

    def _head(self, rows: int, tensor: int) -> float:
        job = self.job
        model = dataclasses.replace(job.model, vocab_size=job.model.vocab_size // tensor)
        params = abstract_params(parameter_table(model), job.policy.parameters)
        del params["layers"]
        labels = jax.ShapeDtypeStruct((rows, job.length), jnp.int32)

        def forward(params: Params, x: Array, labels: Array) -> Array:
            decoder = self._decoder(model, job.execution)

            def loss(h: Array, head: Array, labels: Array, weights: Array) -> Array:
                return decoder.token_loss(h, head, labels)[0].sum()

            h, weights = decoder.hidden(params, x), jnp.ones(labels.shape, jnp.float32)
            num = job.execution.num_loss_chunks
            return sum_over_chunks(loss, num, h, decoder.head(params), labels, weights)

        name = f"the head with {rows} rows"
        found = self._timed(name, forward, params, self._residual(rows), labels)
        return sum(found) / self.clock.head(rows * job.length, tensor)

    def _timed(self, name: str, forward: Callable, *arguments: Any) -> Seconds:
        found = self.times(forward, *arguments)
        if math.isinf(found.forward):
            raise OutOfMemory(f"{name} ran out of memory when it was measured")
        return found

    def _decoder(self, model: ModelConfig, execution: ExecutionConfig) -> Decoder:
        return Decoder(model, execution.operations(), self.job.policy, execution)

    def _residual(self, rows: int) -> jax.ShapeDtypeStruct:
        shape = (rows, self.job.length, self.job.model.model_dim)
        return jax.ShapeDtypeStruct(shape, self.job.policy.compute)

    def _batch(self, rows: int) -> Batch:
        shape = (rows, self.job.length)
        positions = jnp.broadcast_to(jnp.arange(self.job.length, dtype=jnp.int32), shape)
        return {"tokens": jnp.zeros(shape, jnp.int32), "positions": positions}


def share_of_layer(layer: LayerConfig, tensor: int) -> LayerConfig:
    """What one member of a tensor group computes of a layer."""
    attention, feed_forward = layer.attention, layer.feed_forward
    num_heads = max(1, attention.num_heads // tensor)
    num_kv_heads = max(1, attention.num_kv_heads // tensor)
    return dataclasses.replace(
        layer,
        attention=dataclasses.replace(attention, num_heads=num_heads, num_kv_heads=num_kv_heads),
        feed_forward=dataclasses.replace(feed_forward, dim=feed_forward.dim // tensor),
    )
