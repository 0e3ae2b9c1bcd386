"""What follows from a model and a mesh before anything is allocated; misfits are refused."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxscale import tree
from jaxscale.models.parameters import Table, init_params
from jaxscale.ops.attention import attention
from jaxscale.ops.attention.intervals import attention_over_intervals
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.pipeline.loss import check_staged
from jaxscale.parallel.pipeline.schedule import Schedule, make_schedule
from jaxscale.parallel.pipeline.stages import canonical_shapes, from_canonical, to_canonical
from jaxscale.parallel.region import LossFn, Region, make_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.parallel.sequence.layout import Chunked, Contiguous, TokenLayout, Zigzag
from jaxscale.parallel.sequence.ring import ring_attention
from jaxscale.train.config import TrainConfig
from jaxscale.train.host import HOST, check_host_memory, through_device
from jaxscale.train.optim import (
    OptimizerConfig,
    check_moments,
    learning_rates,
    make_optimizer,
)
from jaxscale.train.state import TrainState, abstract_state, run_key, state_dims
from jaxscale.types import InputError, Params, Role

# The generator of random numbers takes seconds a leaf to optimise on a CPU, and runs once.
RUNS_ONCE = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model ready to be trained on a mesh, of which nothing is allocated yet.

    Args:
        table: the model's parameters.
        dtype: type of the stored matrices.
        loss_fn: under the contract of `models.losses`.
        region: mesh, shardings, operations and micro-batches.
        optimizer: of the trainable parameters.
        learning_rates: by the number of finished steps.
        state: the state as shapes with shardings.
    """

    table: Table
    dtype: str
    loss_fn: LossFn
    region: Region
    optimizer: optax.GradientTransformation
    learning_rates: optax.Schedule
    state: TrainState

    @property
    def mesh(self) -> Mesh:
        """The device mesh."""
        return self.region.mesh

    @functools.cached_property
    def dims(self) -> TrainState:
        """Dim letters of the state's leaves."""
        return state_dims(self.state, self.region.specs, self.region.trainable)

    def resting(self) -> dict[str, Any]:
        """What lies in memory at the end of a backward, as shapes with shardings."""
        region = self.region

        def gradient(leaf: Any, spec: Any) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(region.mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, region.reduction, sharding=sharding)

        trained = tree.select(self.state.params, region.trainable)
        specs = tree.select(region.specs.gradients, region.trainable)
        return {
            "parameters": self.state.params,
            "optimizer state": self.state.opt_state,
            "gradients": jax.tree.map(gradient, trained, specs),
        }

    def norm(self, params: Params) -> jax.Array:
        """The norm of parameters; a forbidden word's bias, which is -inf and no fault, adds 0."""
        return optax.tree.norm(self.allowed(params))

    def allowed(self, params: Params) -> Params:
        """The parameters with 0 in place of the biases of forbidden words."""
        entries = tree.flatten(self.table)

        def of(path: str, leaf: jax.Array) -> jax.Array:
            is_bias = entries[path].role == Role.LOGIT_BIAS
            return jnp.where(leaf == -jnp.inf, 0, leaf) if is_bias else leaf

        return tree.map_with_path(of, params)

    def init(self, seed: int) -> TrainState:
        """The first state, each leaf made where it lives; the same numbers on any mesh."""
        specs = self.region.specs

        def first() -> TrainState:
            state = self._first(seed)
            params = specs.layout.store(state.params, specs.dims)
            opt_state = self.optimizer.init(tree.select(params, self.region.trainable))
            return dataclasses.replace(state, params=params, opt_state=opt_state)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return jax.jit(first, out_shardings=shardings, compiler_options=RUNS_ONCE)()

    def draw_missing(self, seed: int, state: TrainState) -> TrainState:
        """A canonical state with what `init` draws for each leaf that is None; draws no other."""
        wanted = tree.flatten(self.canonical_state)
        missing = [path for path in wanted if path not in tree.flatten(state)]

        def draw() -> list[jax.Array]:
            drawn = tree.flatten(self._first(seed))
            return [drawn[path] for path in missing]

        shardings = [wanted[path].sharding for path in missing]
        drawn = jax.jit(draw, out_shardings=shardings, compiler_options=RUNS_ONCE)()
        leaves = tree.flatten(state) | dict(zip(missing, drawn))
        return tree.map_with_path(lambda path, _: leaves[path], self.canonical_state)

    @property
    def canonical_state(self) -> TrainState:
        """The state as it is on disk: shapes with shardings, whatever the pipeline."""
        return canonical_shapes(self.state, self.dims, self.region.specs.layout)

    def to_canonical(self, state: TrainState) -> TrainState:
        """The state as it is on disk."""
        return self._convert(to_canonical, state, self.canonical_state)

    def from_canonical(self, state: TrainState) -> TrainState:
        """A state from disk as this run's pipeline stores it."""
        return self._convert(from_canonical, state, self.state)

    def _first(self, seed: int) -> TrainState:
        """The first state in the order of the layers, as it is on disk."""
        key = jax.random.fold_in(jax.random.key(seed), 0)
        params = init_params(self.table, key, self.dtype)
        opt_state = self.optimizer.init(tree.select(params, self.region.trainable))
        return TrainState(jnp.int32(0), params, opt_state, run_key(seed), jnp.bool_(True))

    def _convert(
        self,
        convert: Callable,
        state: TrainState,
        wanted: TrainState,
    ) -> TrainState:
        """Converts leaf by leaf what rests on the host, and the rest at once.

        What rests on the host is always copied: a checkpoint may be written from it while later
        steps overwrite the original.
        """
        layout = self.region.specs.layout
        if not self.region.specs.is_optimizer_on_host:
            return convert(state, self.state, self.dims, layout)

        def one(
            leaf: Any,
            stored: Any,
            dims: Any,
            wanted: Any,
        ) -> Any:
            def change(leaf: Any) -> Any:
                return convert(leaf, stored, dims, layout)

            is_array = isinstance(leaf, jax.Array)
            if is_array and leaf.sharding.memory_kind == HOST:
                return through_device(change, leaf, wanted.sharding)
            return change(leaf)

        return jax.tree.map(one, state, self.state, self.dims, wanted)


def make_setup(
    *,
    table: Table,
    loss_fn: LossFn,
    mesh: MeshConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    policy: Policy = Policy(),
    attention_backend: str | None = None,
    token_layout: TokenLayout | None = None,
    devices: list[jax.Device] | None = None,
) -> Setup:
    """Checks that the parts fit one another and lays the training out.

    Args:
        table: of the model's parameters; any model's.
        loss_fn: under the contract of `models.losses`.
        mesh: axis sizes and how each is used.
        optimizer: optimizer and schedule.
        train: steps, micro-batches, what is trainable.
        policy: dtypes.
        attention_backend: named backend of attention, for models that call it.
        token_layout: where the tokens of a sequence lie; None for what the mesh's ring asks for.
        devices: of the mesh; all devices when None.
    Raises:
        InputError: the parts do not fit one another, with the equation that fails.
    """
    check_training(table, loss_fn, mesh, train)
    check_moments(optimizer, policy.parameters)
    region = make_region(
        table=table,
        mesh=mesh,
        train=train,
        policy=policy,
        attention_backend=attention_backend,
        token_layout=token_layout,
        devices=devices,
    )
    _check_layout(loss_fn, mesh, region.token_layout)
    # Devices that are only described have no memories.
    if mesh.is_optimizer_on_host and devices is None:
        check_host_memory(region.mesh.local_devices[0])
    num_epochs = epochs_of(loss_fn)
    transformation = make_optimizer(
        optimizer, steps=train.steps, num_epochs=num_epochs, table=table
    )
    rates = learning_rates(optimizer, train.steps)
    state = abstract_state(
        table,
        transformation,
        mesh=region.mesh,
        specs=region.specs,
        dtype=policy.parameters,
        trainable=train.trainable,
    )
    return Setup(table, policy.parameters, loss_fn, region, transformation, rates, state)


def epochs_of(loss_fn: LossFn) -> int:
    """Updates by the batch of one step; one for a loss that does not say."""
    return getattr(loss_fn, "num_epochs", 1)


def _check_layout(loss_fn: LossFn, mesh: MeshConfig, layout: TokenLayout) -> None:
    """Refuses tokens that lie elsewhere than a strategy thinks: it would mask the wrong keys."""
    strategy = getattr(getattr(loss_fn, "execution", None), "strategy", None)
    if strategy is None or mesh.sequence * mesh.tensor == 1:
        return
    wanted = Chunked(strategy.chunk_tokens) if isinstance(strategy, FullyPipelined) else None
    given = layout if isinstance(layout, Chunked) else None
    if given != wanted:
        expected = f"{wanted or 'no chunks'}, for the loss's strategy is {strategy}"
        raise InputError("token_layout", layout, expected)


def make_region(
    *,
    table: Table,
    mesh: MeshConfig,
    train: TrainConfig,
    policy: Policy,
    attention_backend: str | None = None,
    token_layout: TokenLayout | None = None,
    devices: list[jax.Device] | None = None,
) -> Region:
    """The manual region; arguments and errors as `make_setup`."""
    device_mesh = make_mesh(mesh, devices)
    specs = make_specs(table, mesh)
    operations = make_operations(
        mesh,
        specs,
        attention=_make_attention(mesh, attention_backend),
        chunk_attention=functools.partial(
            attention_over_intervals, implementation=attention_backend
        ),
        reduction=policy.reduction,
    )
    if token_layout is None:
        token_layout = Zigzag(mesh.ring) if mesh.ring > 1 else Contiguous()
    return Region(
        mesh=device_mesh,
        specs=specs,
        operations=operations,
        num_microbatches=train.num_microbatches,
        schedule=_make_schedule(mesh, train),
        token_layout=token_layout,
        reduction=policy.reduction,
        trainable=train.trainable,
    )


def _make_attention(mesh: MeshConfig, backend: str | None) -> Callable:
    """Attention of the tokens of one ring member, or of all where there is no ring."""
    if mesh.ring == 1:
        return functools.partial(attention, implementation=backend)
    return ring_attention(
        ring=mesh.ring,
        num_ulysses=mesh.sequence // mesh.ring,
        # In a branch that only some stages take, a permute is wrong on CPUs.
        uses_permute=mesh.pipeline == 1,
        # The ring's reference goes by chunks of queries, too.
        implementation="reference" if backend == "chunked" else backend,
    )


def _make_schedule(mesh: MeshConfig, train: TrainConfig) -> Schedule | None:
    """The pipeline's schedule; None without a pipeline."""
    if mesh.pipeline == 1:
        return None
    return make_schedule(mesh.schedule, mesh.pipeline, mesh.num_chunks, train.num_microbatches)


def check_training(
    table: Table,
    loss_fn: LossFn,
    mesh: MeshConfig,
    train: TrainConfig,
) -> None:
    """Raises InputError unless something is trained and the mesh's pipeline can run the loss."""
    if not tree.flatten(tree.select(table, train.trainable)):
        paths = ", ".join(tree.flatten(table))
        expected = f"a pattern that matches one of {paths}"
        raise InputError("TrainConfig.trainable", train.trainable, expected)
    if mesh.pipeline == 1:
        return
    _make_schedule(mesh, train)
    check_staged(loss_fn)
    if mesh.schedule == "zero_bubble" and not loss_fn.is_by_period:
        expected = (
            'False with MeshConfig.schedule = "zero_bubble": a loop over layers cannot be split '
            "into B and W"
        )
        raise InputError("ExecutionConfig.is_scanned", True, expected)
