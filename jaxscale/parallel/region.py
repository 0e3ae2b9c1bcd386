"""The manual region, where every collective is ours: a model's gradient, evaluation and forward.

Its `shard_map` does not check which values vary over which axes (`check_vma=False`): the transposes
of our collectives say it, and kernels inside the region could not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxscale import tree
from jaxscale.ops.backends import Backends, Operations
from jaxscale.ops.collectives import Collectives
from jaxscale.ops.draws import with_token_keys
from jaxscale.parallel import tensor
from jaxscale.parallel.expert import make_experts
from jaxscale.parallel.mesh import (
    AXES,
    BATCH_SPEC,
    DATA,
    EXPERT,
    PIPELINE,
    SEQUENCE,
    TENSOR,
    MeshConfig,
)
from jaxscale.parallel.pipeline import head
from jaxscale.parallel.pipeline.engine import Pipeline
from jaxscale.parallel.pipeline.loss import StagedLoss, check_staged
from jaxscale.parallel.pipeline.schedule import Schedule
from jaxscale.parallel.rules import Specs
from jaxscale.parallel.sequence.layout import Contiguous, TokenLayout
from jaxscale.parallel.sequence.ulysses import ChunkExchange, ulysses
from jaxscale.parallel.zero import hold, make_gather, reduce_gradient
from jaxscale.types import Batch, InputError

LossFn = Callable[..., tuple[Any, Any, dict[str, Any]]]


def make_operations(
    config: MeshConfig,
    specs: Specs,
    *,
    attention: Callable,
    chunk_attention: Callable = Backends.chunk_attention,
    reduction: str,
) -> Operations:
    """The operations that a mesh injects for training and evaluation.

    Args:
        config: the mesh.
        specs: of the parameter tree.
        attention: runs on local heads and rows as it would on one device.
        chunk_attention: of one chunk over another, see `ops.backends.ChunkAttention`.
        reduction: type in which gradients are summed over devices.
    """
    num_members = config.sequence // config.ring
    if num_members > 1:
        attention = ulysses(attention, num_members=num_members, ring=config.ring)
    exchange = ChunkExchange(config.sequence) if config.sequence > 1 else Collectives()
    # In a branch that some pipeline stages do not take, a permute is wrong on CPUs.
    is_pipelined = config.pipeline > 1
    collectives = Collectives(
        gather_parameters=make_gather(specs, reduction),
        gather_tokens=tensor.gather_tokens,
        reduce_scatter_tokens=tensor.reduce_scatter_tokens,
        column_then_row=(
            tensor.column_then_row if is_pipelined else tensor.column_then_row_by_member
        ),
        whole_rows=tensor.whole_rows,
        own_tokens=tensor.own_tokens,
        first_column=_first_column(config),
        kv_heads=tensor.kv_heads,
        sum_over_heads=tensor.sum_over_heads,
        sum_over_tokens=tensor.sum_over_tokens,
        sum_over_rows=tensor.sum_over_rows,
        heads_by_member=exchange.heads_by_member,
        to_heads=exchange.to_heads,
        to_tokens=exchange.to_tokens,
        whole_chunk=exchange.whole_chunk,
        is_counted=tensor.is_counted,
    )
    backends = Backends(
        attention=attention,
        chunk_attention=chunk_attention,
        experts=make_experts(config),
        embed=tensor.embed,
        logits=tensor.refuse_logits,
        token_loss=head.token_loss if is_pipelined else tensor.token_loss,
    )
    return Operations(collectives, backends)


def make_serving_operations(
    config: MeshConfig,
    specs: Specs,
    *,
    attention: Callable,
) -> Operations:
    """The operations that a mesh injects for decoding, where nothing is differentiated.

    A step has few tokens, so that the residual is replicated over the tensor group, as its rows
    are. Each group may have rows of its own.

    Args:
        config: the mesh.
        specs: of the parameter tree.
        attention: over local heads and rows and a cache of their own.
    Raises:
        InputError: the mesh has a pipeline or cuts the sequence.
    """
    for axis in (PIPELINE, SEQUENCE):
        if getattr(config, axis) > 1:
            expected = "1 for decoding, which runs over data, expert and tensor"
            raise InputError(f"MeshConfig.{axis}", getattr(config, axis), expected)

    def column_then_row(column: Callable, row: Callable, x: Any, *by_token: Any) -> tuple:
        hidden, kept = column(x, *by_token)
        return tensor.sum_partial(row(hidden)), kept

    collectives = Collectives(
        gather_parameters=make_gather(specs, "float32"),
        reduce_scatter_tokens=tensor.sum_partial,
        column_then_row=column_then_row,
        first_column=_first_column(config),
        kv_heads=tensor.kv_heads,
        sum_over_heads=tensor.sum_over_heads,
    )
    backends = Backends(
        attention=attention,
        experts=make_experts(config),
        embed=tensor.embed_replicated,
        logits=tensor.logits,
    )
    return Operations(collectives, backends)


def _first_column(config: MeshConfig) -> Callable:
    """Whole experts on a tensor rank have all their columns."""
    if config.expert_axis == TENSOR:
        return Collectives.first_column
    return tensor.first_column


# Compared by identity, so that what is compiled for a region can be kept under it.
@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """What the manual region needs to know about a run.

    Args:
        mesh: the device mesh.
        specs: of the parameter tree.
        operations: as `make_operations` returns them.
        num_microbatches: M; global row r belongs to micro-batch r % M, on any mesh.
        schedule: of the pipeline; None without one.
        token_layout: where the tokens of a sequence lie.
        reduction: type in which gradients are accumulated and summed.
        trainable: regular expression over parameter paths; the others get no gradient.
    """

    mesh: Mesh
    specs: Specs
    operations: Operations
    num_microbatches: int = 1
    schedule: Schedule | None = None
    token_layout: TokenLayout = Contiguous()
    reduction: str = "float32"
    trainable: str = ".*"

    def gradient(self, loss_fn: LossFn) -> Callable:
        """Returns f(params, batch, key) -> ((sum_loss, sum_weight, metrics), gradients).

        The batch that the loss is given has `token_keys`, made of `key` and each token's place in
        the global batch. Gradients are those of sum_loss. They have None where a parameter is not
        trainable, are of the reduction type and sharded as `specs.gradients` says. Sums are over
        all micro-batches and devices; nothing is divided here.
        """
        held = tree.select(self.specs.held, self.trainable)
        wanted = tree.select(self.specs.gradients, self.trainable)

        def local(
            params: Any,
            batch: Batch,
            key: jax.Array,
        ):
            params, batch = self._begin(params, batch)
            if self.schedule is None:
                sums, gradients = self._accumulate(loss_fn, params, batch, key)
            else:
                microbatches = jax.tree.map(self._split, batch)
                sums, gradients = self._pipeline(loss_fn, params, microbatches).gradient()
            gradients = jax.tree.map(reduce_gradient, gradients, held, wanted)
            return lax.psum(sums, AXES), gradients

        manual = self._manual(local, (PartitionSpec(), wanted))
        return lambda params, batch, key: manual(params, with_token_keys(batch, key), key)

    def evaluate(self, loss_fn: LossFn) -> Callable:
        """Returns f(params, batch, key) -> (sum_loss, sum_weight, metrics).

        Without gradients, and without token keys, so that nothing is drawn.
        """

        def local(
            params: Any,
            batch: Batch,
            key: jax.Array,
        ):
            params, batch = self._begin(params, batch)
            if self.schedule is None:
                sums = loss_fn(params, batch, key, operations=self.operations)
            else:
                whole = jax.tree.map(lambda x: x[None], batch)
                sums = self._pipeline(loss_fn, params, whole).evaluate()
            return lax.psum(sums, AXES)

        return self._manual(local, PartitionSpec())

    def rows(self, f: Callable) -> Callable:
        """Returns g(params, batch) -> a tree of [B, T], whole rows in the batch's order.

        Without gradients, a micro-batch at a time.

        Args:
            f: (params, local batch, operations=) -> a tree of [B, T] that is the same on all
                devices which have tokens of its rows.
        """

        def local(params: Any, batch: Batch):
            params, batch = self._begin(params, batch)
            microbatches = jax.tree.map(self._split, batch)
            found = lax.map(lambda each: f(params, each, operations=self.operations), microbatches)
            # [M, b / M, T] -> [b, T], the way back from `_split`.
            return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, x.shape[-1]), found)

        in_specs = (self.specs.parameters, BATCH_SPEC)
        out_specs = PartitionSpec((DATA, EXPERT))
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def forward(
        self,
        f: Callable,
        *,
        in_specs: Any,
        out_specs: Any,
    ) -> Callable:
        """`f(params, *arguments)` in the manual region, for decoding; nothing is reduced here.

        Args:
            f: on local arrays; its model is bound to `make_serving_operations`.
            in_specs: of the arguments after the parameters, a tuple.
            out_specs: of the results.
        """
        specs = (self.specs.parameters, *in_specs)
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=specs, out_specs=out_specs, check_vma=False
        )

    def _begin(self, params: Any, batch: Batch) -> tuple[Any, Batch]:
        """Once a step: gathers what is outside the stack, and lays the tokens out.

        Of the parameters outside the stack each pipeline stage stores a share.
        """
        return hold(params, self.specs), self.token_layout.place(batch)

    def _pipeline(
        self,
        loss_fn: StagedLoss,
        params: Any,
        microbatches: Batch,
    ) -> Pipeline:
        check_staged(loss_fn)
        params = {**params, "layers": loss_fn.prepare(params["layers"])}
        trained = tree.select(params, self.trainable)

        def frozen(trained: Any, leaf: Any) -> Any:
            return leaf if trained is None else None

        return Pipeline(
            loss=loss_fn,
            operations=self.operations,
            layout=self.specs.layout,
            schedule=self.schedule,
            trained=trained,
            frozen=jax.tree.map(frozen, trained, params, is_leaf=lambda leaf: leaf is None),
            microbatches=microbatches,
            reduction=self.reduction,
        )

    def _manual(self, local: Callable, out_specs: Any) -> Callable:
        in_specs = (self.specs.parameters, BATCH_SPEC, PartitionSpec())
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _accumulate(
        self,
        loss_fn: LossFn,
        params: Any,
        batch: Batch,
        key: jax.Array,
    ):
        """The sums and their gradients over micro-batches, one after the other."""
        trained = tree.select(params, self.trainable)

        def one(batch: Batch, key: jax.Array):
            def sum_loss(trained: Any):
                whole = tree.merge(trained, params)
                sums = loss_fn(whole, batch, key, operations=self.operations)
                return sums[0], sums

            gradients, sums = jax.grad(sum_loss, has_aux=True)(trained)
            return sums, jax.tree.map(lambda g: g.astype(self.reduction), gradients)

        if self.num_microbatches == 1:
            return one(batch, jax.random.fold_in(key, 0))

        def add(carry: Any, item: tuple[jax.Array, Batch]):
            number, microbatch = item
            found = one(microbatch, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, carry, found), None

        microbatches = jax.tree.map(self._split, batch)
        first = jax.tree.map(lambda x: x[0], microbatches)
        shapes = jax.eval_shape(one, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        numbers = jnp.arange(self.num_microbatches)
        return lax.scan(add, zeros, (numbers, microbatches))[0]

    def _split(self, x: jax.Array) -> jax.Array:
        """[b, ...] -> [M, b / M, ...], row r to micro-batch r % M."""
        by_microbatch = x.reshape(-1, self.num_microbatches, *x.shape[1:])
        return jnp.moveaxis(by_microbatch, 1, 0)
