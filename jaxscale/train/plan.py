"""What follows from a configuration before anything is allocated; every misfit is refused here."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxscale import tree
from jaxscale.data.loader import DataConfig
from jaxscale.models.config import ModelConfig
from jaxscale.models.parameters import parameter_table
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.attention import DETERMINISTIC, AttentionContext, attention, check_backend
from jaxscale.ops.attention.chunked import QUERY_CHUNK
from jaxscale.ops.precision import Policy
from jaxscale.parallel.expert import check_exchange
from jaxscale.parallel.mesh import MeshConfig, check_batch, make_mesh, nearest_divisors
from jaxscale.parallel.pipeline.schedule import Schedule, make_schedule
from jaxscale.parallel.pipeline.stages import (
    StageLayout,
    canonical_shapes,
    from_canonical,
    to_canonical,
)
from jaxscale.parallel.region import LossFn, Region, make_operations
from jaxscale.parallel.rules import make_specs
from jaxscale.parallel.sequence.ring import ring_attention
from jaxscale.train.host import HOST, check_host_memory, through_device
from jaxscale.train.losses import NextTokenLoss
from jaxscale.train.optim import OptimizerConfig, make_optimizer
from jaxscale.train.state import TrainState, abstract_state, state_dims
from jaxscale.types import InputError, Params, check_not_negative, check_positive, check_types

logger = logging.getLogger(__name__)

MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how to train.

    Args:
        steps: optimizer steps of the whole run.
        num_microbatches: M; the batch is cut in M parts whose gradients are summed. Only the
            load-balance loss depends on M: experts' shares are counted in each part.
        seed: of the initial parameters and every draw.
        z_loss: weight of log^2 Z in the loss.
        embedding_noise: alpha of NEFTune (arXiv 2310.05914): embeddings get uniform noise of at
            most alpha / sqrt(T D), for fine-tuning; 0 for none.
        trainable: regular expression over whole parameter paths; what does not match stays as it is
            and has no optimizer state.
        evaluate_every: steps between evaluations.
        init_from: checkpoint directory of the same model whose parameters a new run starts from;
            None to draw them.
        profile_steps: the profiler records from the first number of finished steps to the second.
    """

    steps: int
    num_microbatches: int = 1
    seed: int = 0
    z_loss: float = 0.0
    embedding_noise: float = 0.0
    trainable: str = ".*"
    evaluate_every: int = 100
    init_from: str | None = None
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self):
        check_types(self)
        for name in ("steps", "num_microbatches", "evaluate_every"):
            check_positive(f"TrainConfig.{name}", getattr(self, name))
        if (
            self.profile_steps
            and not 0 <= self.profile_steps[0] < self.profile_steps[1] <= self.steps
        ):
            raise InputError(
                "TrainConfig.profile_steps",
                self.profile_steps,
                f"0 <= first < second <= {self.steps}",
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError("TrainConfig.seed", self.seed, f"0 <= seed <= {MAX_SEED}")
        check_not_negative("TrainConfig.z_loss", self.z_loss)
        check_not_negative("TrainConfig.embedding_noise", self.embedding_noise)
        tree.compile_pattern("TrainConfig.trainable", self.trainable)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from the configuration before anything is allocated: mesh, loss, optimizer, abstract state."""

    mesh: Mesh
    region: Region
    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    state: TrainState

    @functools.cached_property
    def dims(self) -> TrainState:
        """Dim letters of the state's leaves."""
        return state_dims(self.state, self.region.specs, self.region.trainable)

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

    def params_from_canonical(self, params: Params) -> Params:
        """Parameters from disk as this run's pipeline stores them."""
        return from_canonical(params, self.state.params, self.dims.params, self.region.specs.layout)

    def _convert(self, convert: Callable, state: TrainState, wanted: TrainState) -> TrainState:
        """What rests on the host is always copied: a checkpoint may be written from it while steps overwrite theirs."""

        def one(leaf: Any, stored: Any, dims: Any, wanted: Any) -> Any:
            def change(leaf: Any) -> Any:
                return convert(leaf, stored, dims, self.region.specs.layout)

            is_host = isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == HOST
            return through_device(change, leaf, wanted.sharding) if is_host else change(leaf)

        if not self.region.specs.is_optimizer_on_host:
            return convert(state, self.state, self.dims, self.region.specs.layout)
        return jax.tree.map(one, state, self.state, self.dims, wanted)


def check_fit(
    *,
    model: ModelConfig,
    mesh: MeshConfig,
    data: DataConfig,
    train: TrainConfig,
    policy: Policy,
    stack: StackConfig,
) -> None:
    """Raises InputError, with the equation that fails, unless lengths, batch and chunks fit one another."""
    if data.sequence_length > model.max_length:
        raise InputError(
            "DataConfig.sequence_length",
            data.sequence_length,
            f"sequence_length <= max_length = {model.max_length}",
        )
    if not tree.flatten(tree.select(parameter_table(model), train.trainable)):
        paths = ", ".join(tree.flatten(parameter_table(model)))
        raise InputError(
            "TrainConfig.trainable", train.trainable, f"a pattern that matches one of {paths}"
        )
    if (
        mesh.ring == 1
    ):  # a ring's backends are refused when the step is traced, which is before anything is written
        _check_attention(model, data, stack, policy)
    _make_schedule(mesh, train, stack)
    StageLayout(model.num_periods, mesh.pipeline, mesh.num_chunks, mesh.stage_periods)
    check_batch(
        mesh,
        batch_size=data.batch_size,
        length=data.sequence_length,
        num_microbatches=train.num_microbatches,
    )
    own, chunks = data.sequence_length // (mesh.sequence * mesh.tensor), stack.num_loss_chunks
    if own % chunks:
        raise InputError(
            "StackConfig.num_loss_chunks",
            chunks,
            f"sequence_length / (sequence * tensor) % num_loss_chunks == 0, here {data.sequence_length} / "
            f"({mesh.sequence} * {mesh.tensor}) % {chunks} = {own % chunks}; nearest: {nearest_divisors(own, chunks)}",
        )


def _check_attention(
    model: ModelConfig, data: DataConfig, stack: StackConfig, policy: Policy
) -> None:
    """Refuses now what a named backend would refuse when it is traced."""
    if stack.attention is not None:
        tokens = jax.ShapeDtypeStruct((data.batch_size, data.sequence_length), "int32")
        q = jax.ShapeDtypeStruct((*tokens.shape, model.num_heads, model.head_dim), policy.compute)
        context = AttentionContext(tokens, segments=tokens, softcap=model.attention_softcap)
        check_backend("StackConfig.attention", stack.attention, q, context)


def deterministic_stack(stack: StackConfig, length: int) -> StackConfig:
    """The stack with an attention backend that gives the same bits again.

    cuDNN and our kernel add the queries' gradient up in whatever order blocks finish, and cuDNN
    does not compile under XLA's deterministic flags.

    Args:
        stack: as configured; with no backend named, one is chosen.
        length: T, which "chunked" must divide.
    Raises:
        InputError: another backend was named.
    """
    if stack.attention not in (None, *DETERMINISTIC):
        raise InputError(
            "StackConfig.attention",
            stack.attention,
            f"one of {DETERMINISTIC} with RuntimeConfig.is_deterministic: "
            "the others' backward is not deterministic",
        )
    backend = stack.attention or ("reference" if length % QUERY_CHUNK else "chunked")
    logger.info("attention: backend %s, as the run is deterministic", backend)
    return dataclasses.replace(stack, attention=backend)


def make_region(
    *,
    model: ModelConfig,
    mesh: MeshConfig,
    train: TrainConfig,
    policy: Policy,
    stack: StackConfig,
    devices: list[jax.Device] | None = None,
) -> Region:
    """The manual region of a run on all devices or on `devices`; arguments as `pretrain`.

    Raises:
        InputError: mesh, devices and model do not fit.
    """
    device_mesh = make_mesh(mesh, devices)
    check_exchange(mesh, device_mesh.devices.flat)
    specs = make_specs(parameter_table(model), mesh)
    operations = make_operations(
        mesh, specs, attention=_make_attention(mesh, stack), reduction=policy.reduction
    )
    return Region(
        device_mesh,
        specs,
        operations,
        num_microbatches=train.num_microbatches,
        schedule=_make_schedule(mesh, train, stack),
        ring=mesh.ring,
        reduction=policy.reduction,
        trainable=train.trainable,
    )


def _make_attention(mesh: MeshConfig, stack: StackConfig) -> Callable:
    """Attention of the tokens of one ring member, or of all where there is no ring."""
    if mesh.ring == 1:
        return functools.partial(attention, implementation=stack.attention)
    return ring_attention(
        ring=mesh.ring,
        num_ulysses=mesh.sequence // mesh.ring,
        uses_permute=mesh.pipeline == 1,
        implementation="reference"
        if stack.attention == "chunked"
        else stack.attention,  # which goes by chunks too
    )


def _make_schedule(mesh: MeshConfig, train: TrainConfig, stack: StackConfig) -> Schedule | None:
    """The pipeline's schedule; None without a pipeline."""
    if mesh.pipeline == 1:
        return None
    if mesh.schedule == "zero_bubble" and stack.is_scanned:
        expected = 'False with MeshConfig.schedule = "zero_bubble": a loop over layers cannot be split into B and W'
        raise InputError("StackConfig.is_scanned", True, expected)
    return make_schedule(mesh.schedule, mesh.pipeline, mesh.num_chunks, train.num_microbatches)


def make_plan(
    *,
    model: ModelConfig,
    mesh: MeshConfig,
    data: DataConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    policy: Policy,
    stack: StackConfig,
    devices: list[jax.Device] | None = None,
    make_loss: Callable[..., LossFn] = NextTokenLoss,
) -> Plan:
    """Checks that the parts fit one another and lays the run out; arguments as `pretrain`.

    Raises:
        InputError: they do not fit, with the equation that fails.
    """
    region = make_region(
        model=model, mesh=mesh, train=train, policy=policy, stack=stack, devices=devices
    )
    check_fit(model=model, mesh=mesh, data=data, train=train, policy=policy, stack=stack)
    if (
        mesh.is_optimizer_on_host and devices is None
    ):  # those that are only described have no memories
        check_host_memory(region.mesh.local_devices[0])
    transformation = make_optimizer(optimizer, steps=train.steps, dims=region.specs.dims)
    state = abstract_state(
        model,
        transformation,
        mesh=region.mesh,
        specs=region.specs,
        dtype=policy.parameters,
        trainable=train.trainable,
    )
    width = train.embedding_noise / math.sqrt(data.sequence_length * model.model_dim)
    noise = {"embedding_noise": width} if width else {}
    loss_fn = make_loss(model=model, policy=policy, stack=stack, z_loss=train.z_loss, **noise)
    return Plan(region.mesh, region, loss_fn, transformation, state)
