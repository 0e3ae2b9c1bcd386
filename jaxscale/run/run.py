"""A run as one value: everything that a gin file says of a training, for every verb."""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from jaxscale import config, tree
from jaxscale.checkpoint.manager import CheckpointConfig
from jaxscale.data.loader import DataConfig
from jaxscale.launch.runtime import RuntimeConfig
from jaxscale.models.config import ModelConfig
from jaxscale.models.execution import ByChunk, ExecutionConfig
from jaxscale.models.lora import TRAINABLE
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.masked import MaskedTokenLoss
from jaxscale.models.parameters import Table, parameter_table
from jaxscale.ops.attention import DETERMINISTIC, AttentionContext, check_backend
from jaxscale.ops.attention.chunked import QUERY_CHUNK
from jaxscale.ops.attention.intervals import attention_over_intervals
from jaxscale.ops.device import is_hopper
from jaxscale.ops.precision import Policy
from jaxscale.parallel.elastic import shrink
from jaxscale.parallel.mesh import MeshConfig, check_batch, nearest_divisors
from jaxscale.parallel.pipeline.stages import StageLayout
from jaxscale.parallel.region import LossFn, Region
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.parallel.sequence.head_chunks import HeadChunks
from jaxscale.parallel.sequence.layout import Chunked, TokenLayout
from jaxscale.rlhf.dpo import DpoLoss
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.reporters import TensorBoard
from jaxscale.train.setup import Setup, make_region, make_setup
from jaxscale.types import InputError, check_types

logger = logging.getLogger(__name__)


def next_token_loss(run: "Run") -> LossFn:
    """The loss of pretraining, see `models.losses.NextTokenLoss`.

    Args:
        run: whose model is trained.
    """
    if run.data.is_paired:
        expected = "dpo_loss for pairs: the next token's loss would learn rejected answers too"
        raise InputError("Run.loss", "next_token_loss", expected)
    # NEFTune's width is alpha / sqrt(T D).
    width = run.data.sequence_length * run.model.model_dim
    return NextTokenLoss(
        model=run.model,
        policy=run.policy,
        execution=run.execution,
        z_loss=run.train.z_loss,
        embedding_noise=run.train.embedding_noise / math.sqrt(width),
    )


def masked_token_loss(run: "Run", *, mask_id: int, fraction: float = 0.15) -> LossFn:
    """The loss of a bidirectional model, see `models.masked.MaskedTokenLoss`.

    Args:
        run: whose model is trained.
        mask_id: the token that stands for a hidden one.
        fraction: of the tokens that are hidden in training.
    """
    return MaskedTokenLoss(
        model=run.model,
        policy=run.policy,
        execution=run.execution,
        z_loss=run.train.z_loss,
        mask_id=mask_id,
        fraction=fraction,
    )


def dpo_loss(run: "Run", *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossFn:
    """The loss of preferences, see `rlhf.dpo.DpoLoss`.

    Args:
        run: whose model, which has adapters, learns from pairs of `PreferenceSource`.
        beta: weight of the divergence from the reference.
        label_smoothing: probability that a pair is the wrong way round.
    """
    if not run.data.is_paired:
        expected = "PreferenceSource for dpo_loss"
        raise InputError("DataConfig.sources", run.data.sources, expected)
    if run.mesh.pipeline > 1:
        expected = "1 for dpo_loss: no stage of a pipeline has the whole sum over an answer"
        raise InputError("MeshConfig.pipeline", run.mesh.pipeline, expected)
    trained = tree.flatten(tree.select(run.table(), run.train.trainable))
    others = [path for path, leaf in trained.items() if leaf and not re.fullmatch(TRAINABLE, path)]
    if others:
        expected = f"adapters alone, {TRAINABLE!r}, for dpo_loss: the rest is the reference"
        raise InputError("TrainConfig.trainable", run.train.trainable, expected)
    return DpoLoss(
        model=run.model,
        policy=run.policy,
        execution=run.execution,
        beta=beta,
        label_smoothing=label_smoothing,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a run is.

    Args:
        directory: of the run: its configuration, metrics, checkpoints and profile.
        model: the model.
        mesh: axis sizes and ZeRO level; or a planner, run -> the same run with a mesh,
            micro-batches and remat, called when the run is made, see `run.planned.PlannedMesh`.
        data: sources, tokenizer, sequence length and global batch size.
        optimizer: optimizer and schedule.
        train: steps, micro-batches, seed.
        checkpoint: its directory is relative to `directory`.
        policy: dtypes.
        execution: how the layers are executed.
        runtime: platform, flags, processes and watchdog.
        loss: run -> a loss under the contract of `models.losses`.
        evaluators: name -> evaluator(context) -> figures, see `models.evaluation`.
        reporters: what gets the figures beside `metrics.jsonl`, see `train.reporters.Reporter`.
    """

    directory: str
    model: ModelConfig
    mesh: MeshConfig | Callable[["Run"], "Run"]
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    policy: Policy = Policy()
    execution: ExecutionConfig = ExecutionConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    loss: Callable[["Run"], LossFn] = next_token_loss
    evaluators: dict[str, Callable] = dataclasses.field(default_factory=dict)
    reporters: tuple[Callable, ...] = (TensorBoard(),)

    def __post_init__(self):
        check_types(self)
        if not self.directory.strip():
            raise InputError("Run.directory", self.directory, "the name of a folder")
        if not isinstance(self.mesh, MeshConfig):
            planned = self.mesh(self)
            for name in ("mesh", "train", "execution"):
                object.__setattr__(self, name, getattr(planned, name))

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.directory).expanduser()

    def table(self) -> Table:
        """The model's parameter table."""
        return parameter_table(self.model)

    def region(self, devices: list[jax.Device] | None = None) -> Region:
        """The manual region alone, for evaluation; arguments and errors as `setup`."""
        return make_region(
            table=self.table(),
            mesh=self.mesh,
            train=self.train,
            policy=self.policy,
            attention_backend=self.execution.attention_backend,
            token_layout=self._token_layout(),
            devices=devices,
        )

    def _token_layout(self) -> TokenLayout | None:
        """Where the strategy of execution wants tokens; None where it does not mind."""
        strategy = self.execution.strategy
        is_chunked = isinstance(strategy, FullyPipelined)
        return Chunked(strategy.chunk_tokens) if is_chunked else None

    def setup(self, devices: list[jax.Device] | None = None) -> Setup:
        """The model ready to be trained, on all devices or on `devices`.

        Raises:
            InputError: the parts do not fit one another, with the equation that fails.
        """
        run = self.deterministic()
        setup = make_setup(
            table=run.table(),
            loss_fn=run.loss(run),
            mesh=run.mesh,
            optimizer=run.optimizer,
            train=run.train,
            policy=run.policy,
            attention_backend=run.execution.attention_backend,
            token_layout=run._token_layout(),
            devices=devices,
        )
        check_fit(run)
        return setup

    def on(self, num_devices: int) -> "Run":
        """The run; if its mesh is elastic, on as many devices as there are.

        Raises:
            InputError: it fits no fewer devices, with meshes that do.
        """
        if not self.mesh.is_elastic:
            return self
        shrunk = shrink(
            self.mesh,
            num_devices,
            batch_size=self.data.batch_size,
            num_microbatches=self.train.num_microbatches,
        )
        if shrunk.mesh == self.mesh:
            return self
        logger.warning(
            "%d devices instead of %d: data = %d and num_microbatches = %d",
            num_devices,
            math.prod(self.mesh.sizes),
            shrunk.mesh.data,
            shrunk.num_microbatches,
        )
        train = dataclasses.replace(self.train, num_microbatches=shrunk.num_microbatches)
        return dataclasses.replace(self, mesh=shrunk.mesh, train=train)

    def deterministic(self) -> "Run":
        """The run; if it is to be deterministic, with an attention that gives the same bits again.

        cuDNN and our kernel for Hopper GPUs add the queries' gradient up in whatever order blocks
        finish, and cuDNN does not compile under XLA's deterministic flags.

        Raises:
            InputError: another backend was named.
        """
        if not self.runtime.is_deterministic:
            return self
        given = self.execution.attention_backend
        # On Hopper GPUs the backend "invariant" has our kernel's backward.
        varying = ("invariant",) if is_hopper() else ()
        allowed = tuple(name for name in DETERMINISTIC if name not in varying)
        if given not in (None, *allowed):
            expected = (
                f"one of {allowed} with RuntimeConfig.is_deterministic: the others' backward "
                "is not deterministic"
            )
            raise InputError("ExecutionConfig.attention", given, expected)
        is_even = self.data.sequence_length % QUERY_CHUNK == 0
        backend = given or ("chunked" if is_even else "reference")
        logger.info("attention: backend %s, as the run is deterministic", backend)
        execution = dataclasses.replace(self.execution, attention=backend)
        return dataclasses.replace(self, execution=execution)


def load_run(
    files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    admitted: Sequence[str] | None = None,
) -> Run:
    """The run that gin files and overrides bind; nothing of it is started.

    Args:
        files: gin files; later ones override earlier ones.
        overrides: as of the command line's `--set`.
        admitted: as `config.run`.
    Raises:
        InputError: a name, type or file is wrong, or a required value is missing.
    """

    def the_run(*, run: Run) -> Run:
        return run

    return config.run(the_run, files, overrides, admitted)


def check_fit(run: Run) -> None:
    """Raises InputError, with what fails, unless lengths, batch, chunks and kernels fit."""
    length, mesh = run.data.sequence_length, run.mesh
    if length > run.model.max_length:
        expected = f"sequence_length <= max_length = {run.model.max_length}"
        raise InputError("DataConfig.sequence_length", length, expected)
    _check_kernels(run)
    # A ring's backends refuse when the step is traced, which is before anything is written.
    if mesh.ring == 1:
        check_attention(run)
    check_batch(
        mesh,
        batch_size=run.data.batch_size,
        length=length,
        num_microbatches=run.train.num_microbatches,
    )
    if mesh.pipeline > 1:
        _check_places(run.execution)
    stages = StageLayout(run.model.num_periods, mesh.pipeline, mesh.num_chunks, mesh.stage_periods)
    run.execution.check_periods(stages.num_slots, num_stages=stages.num_virtual)
    if isinstance(run.execution.strategy, FullyPipelined):
        _check_pipelined(run)
    if isinstance(run.execution.strategy, ByChunk | HeadChunks) and mesh.tensor > 1:
        expected = "Whole() with MeshConfig.tensor > 1, whose members have other tokens each"
        raise InputError("ExecutionConfig.strategy", run.execution.strategy, expected)
    if run.execution.is_batch_invariant and math.prod(mesh.sizes) > mesh.data:
        expected = "a mesh of data alone with the strategy BatchInvariant"
        raise InputError("ExecutionConfig.strategy", run.execution.strategy, expected)
    own = length // (mesh.sequence * mesh.tensor)
    num_chunks = run.execution.num_loss_chunks
    if rest := own % num_chunks:
        expected = (
            "sequence_length / (sequence * tensor) % num_loss_chunks == 0, here "
            f"{length} / ({mesh.sequence} * {mesh.tensor}) % {num_chunks} = {rest}; nearest: "
            f"{nearest_divisors(own, num_chunks)}"
        )
        raise InputError("ExecutionConfig.num_loss_chunks", num_chunks, expected)


def _check_pipelined(run: Run) -> None:
    """Refuses what does not go with `FullyPipelined`."""
    mesh, execution = run.mesh, run.execution
    if execution.remat != "none":
        expected = '"none" with FullyPipelined, which keeps what its backward needs by itself'
        raise InputError("ExecutionConfig.remat", execution.remat, expected)
    if mesh.ring > 1:
        expected = "1 with FullyPipelined, whose chunks every shard of the sequence exchanges"
        raise InputError("MeshConfig.ring", mesh.ring, expected)
    num_rows = run.data.batch_size // (mesh.num_batch_shards * run.train.num_microbatches)
    if mesh.tensor > 1 and num_rows > 1:
        expected = (
            "batch_size / (data * expert * num_microbatches) == 1 with FullyPipelined and "
            f"MeshConfig.tensor > 1, here {num_rows}"
        )
        raise InputError("DataConfig.batch_size", run.data.batch_size, expected)
    if not run.model.is_causal or any(layer.attention.layout for layer in run.model.layers):
        expected = "Whole() where attention is not causal or has a layout of blocks"
        raise InputError("ExecutionConfig.strategy", execution.strategy, expected)
    execution.strategy.check(
        length=run.data.sequence_length, sequence=mesh.sequence, tensor=mesh.tensor
    )


def _check_places(execution: ExecutionConfig) -> None:
    """Refuses what would rest on the host beside a pipeline, whose slots are on the device."""
    strategy = execution.strategy
    if isinstance(strategy, FullyPipelined) and not strategy.is_on_device:
        places = 'inputs and chunks = "device" and attention "device" or "nowhere"'
        refused = "FullyPipelined", strategy, places
    elif execution.checkpoint_every > 1 and execution.checkpoint_place == "host":
        refused = "ExecutionConfig.checkpoint_place", "host", '"device"'
    elif execution.offloaded_names:
        refused = "ExecutionConfig.offloaded_names", execution.offloaded_names, "none"
    else:
        return
    parameter, given, expected = refused
    reason = "MeshConfig.pipeline > 1, whose slots for what a stage keeps are on the device"
    raise InputError(parameter, given, f"{expected} with {reason}")


def _check_kernels(run: Run) -> None:
    """Refuses kernels that were named for a type that none of them takes."""
    named, compute = run.runtime.kernels, run.policy.compute
    if named not in (None, "xla") and compute not in ("bfloat16", "float16"):
        expected = f"'xla' or None with Policy.compute = {compute!r}: they take 16-bit floats"
        raise InputError("RuntimeConfig.kernels", named, expected)


def check_attention(run: Run) -> None:
    """Raises InputError for what a named backend of attention would refuse when it is traced."""
    named = run.execution.attention
    if named is None:
        return
    shape = (run.data.batch_size, run.data.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, "int32")
    for layer in run.model.layers:
        attention = layer.attention
        heads = (*shape, attention.num_heads, attention.head_dim)
        q = jax.ShapeDtypeStruct(heads, run.policy.compute)
        context = AttentionContext(tokens, segments=tokens, softcap=attention.softcap)
        if isinstance(run.execution.strategy, FullyPipelined):
            attention_over_intervals(q, context, implementation=named)
        else:
            check_backend("ExecutionConfig.attention", named, q, context)
