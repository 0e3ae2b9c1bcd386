"""The one manual region: loss and gradient of a micro-batched batch, every collective written by us."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxscale import tree
from jaxscale.ops.draws import with_token_keys
from jaxscale.ops.operations import Operations
from jaxscale.parallel import tensor
from jaxscale.parallel.expert import make_experts
from jaxscale.parallel.mesh import AXES, BATCH_SPEC, TENSOR, MeshConfig
from jaxscale.parallel.pipeline.engine import Pipeline
from jaxscale.parallel.pipeline.loss import StagedLoss
from jaxscale.parallel.pipeline.schedule import Schedule
from jaxscale.parallel.rules import Specs
from jaxscale.parallel.sequence.layout import Zigzag
from jaxscale.parallel.sequence.ulysses import ulysses
from jaxscale.parallel.zero import hold, make_gather, reduce_gradient
from jaxscale.types import Batch

LossFn = Callable[..., tuple[Any, Any, dict[str, Any]]]


def make_operations(
    config: MeshConfig, specs: Specs, *, attention: Callable, reduction: str
) -> Operations:
    """The operations a mesh injects; `attention` runs on local heads and rows as it would on one device."""
    num_members = config.sequence // config.ring
    return Operations(
        attention=attention
        if num_members == 1
        else ulysses(attention, num_members=num_members, ring=config.ring),
        experts=make_experts(config),
        first_hidden=Operations.first_hidden
        if config.expert_axis == TENSOR
        else tensor.first_column,
        gather=make_gather(specs, reduction),
        enter=tensor.gather_tokens,
        exit=tensor.reduce_scatter_tokens,
        between=tensor.column_then_row_by_member
        if config.pipeline == 1
        else tensor.column_then_row,
        own=tensor.own_tokens,
        embed=tensor.embed,
        token_loss=tensor.token_loss,
        total=tensor.sum_over_tokens,
    )


@dataclasses.dataclass(frozen=True)
class Region:
    """What the manual region needs to know about a run.

    Args:
        mesh: the device mesh.
        specs: of the parameter tree.
        operations: as `make_operations` returns them.
        num_microbatches: M; global row r belongs to micro-batch r % M, on any mesh.
        schedule: of the pipeline; None without one.
        ring: members of a ring, for which tokens are laid out; 1 without one.
        reduction: type in which gradients are accumulated and summed.
        trainable: regular expression over parameter paths; the others get no gradient.
    """

    mesh: Mesh
    specs: Specs
    operations: Operations
    num_microbatches: int = 1
    schedule: Schedule | None = None
    ring: int = 1
    reduction: str = "float32"
    trainable: str = ".*"

    def gradient(self, loss_fn: LossFn) -> Callable:
        """Returns f(params, batch, key) -> ((sum_loss, sum_weight, metrics), gradients of sum_loss).

        The batch that the loss is given has `token_keys`, made of `key` and each token's place in
        the global batch. Gradients have None where a parameter is not trainable, are of the
        reduction type and sharded as `specs.gradients` says. Sums are over all micro-batches and
        devices; nothing is divided here.
        """
        held = tree.select(self.specs.held, self.trainable)
        wanted = tree.select(self.specs.gradients, self.trainable)

        def local(params: Any, batch: Batch, key: jax.Array):
            params, batch = self._enter(params, batch)
            if self.schedule is None:
                sums, gradients = self._accumulate(loss_fn, params, batch, key)
            else:
                sums, gradients = self._pipeline(
                    loss_fn, params, jax.tree.map(self._split, batch)
                ).gradient()
            gradients = jax.tree.map(reduce_gradient, gradients, held, wanted)
            return lax.psum(sums, AXES), gradients

        manual = self._manual(local, (PartitionSpec(), wanted))
        return lambda params, batch, key: manual(params, with_token_keys(batch, key), key)

    def evaluate(self, loss_fn: LossFn) -> Callable:
        """Returns f(params, batch, key) -> (sum_loss, sum_weight, metrics), without gradients or token keys."""

        def local(params: Any, batch: Batch, key: jax.Array):
            params, batch = self._enter(params, batch)
            if self.schedule is None:
                return lax.psum(loss_fn(params, batch, key, operations=self.operations), AXES)
            whole = jax.tree.map(lambda x: x[None], batch)
            return lax.psum(self._pipeline(loss_fn, params, whole).evaluate(), AXES)

        return self._manual(local, PartitionSpec())

    def _enter(self, params: Any, batch: Batch) -> tuple[Any, Batch]:
        """Once a step: what stages share is gathered, and the tokens are laid out for the ring."""
        return hold(params, self.specs), Zigzag(self.ring).place(batch) if self.ring > 1 else batch

    def _pipeline(self, loss_fn: StagedLoss, params: Any, microbatches: Batch) -> Pipeline:
        params = {**params, "layers": loss_fn.prepare(params["layers"])}
        trained = tree.select(params, self.trainable)
        frozen = jax.tree.map(
            lambda t, p: p if t is None else None,
            trained,
            params,
            is_leaf=lambda leaf: leaf is None,
        )
        return Pipeline(
            loss_fn,
            self.operations,
            self.specs.layout,
            self.schedule,
            trained,
            frozen,
            microbatches,
            self.reduction,
        )

    def _manual(self, local: Callable, out_specs: Any) -> Callable:
        in_specs = (self.specs.parameters, BATCH_SPEC, PartitionSpec())
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _accumulate(self, loss_fn: LossFn, params: Any, batch: Batch, key: jax.Array):
        frozen = params
        trained = tree.select(params, self.trainable)

        def one(batch: Batch, key: jax.Array):
            def sum_loss(trained: Any):
                sums = loss_fn(tree.merge(trained, frozen), batch, key, operations=self.operations)
                return sums[0], sums

            gradients, sums = jax.grad(sum_loss, has_aux=True)(trained)
            return sums, jax.tree.map(lambda g: g.astype(self.reduction), gradients)

        if self.num_microbatches == 1:
            return one(batch, jax.random.fold_in(key, 0))

        def add(carry: Any, item: tuple[jax.Array, Batch]):
            number, microbatch = item
            return jax.tree.map(
                jnp.add, carry, one(microbatch, jax.random.fold_in(key, number))
            ), None

        microbatches = jax.tree.map(self._split, batch)
        first = jax.tree.map(lambda x: x[0], microbatches)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, first, key))
        return lax.scan(add, zeros, (jnp.arange(self.num_microbatches), microbatches))[0]

    def _split(self, x: jax.Array) -> jax.Array:
        """[b, ...] -> [M, b / M, ...], row r to micro-batch r % M."""
        return jnp.moveaxis(x.reshape(-1, self.num_microbatches, *x.shape[1:]), 1, 0)
