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
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.lora import TRAINABLE
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.masked import MaskedTokenLoss
from jaxscale.models.parameters import Table, parameter_table
from jaxscale.ops.attention import DETERMINISTIC
from jaxscale.ops.attention.chunked import QUERY_CHUNK
from jaxscale.ops.device import is_hopper
from jaxscale.ops.precision import Policy
from jaxscale.parallel.elastic import shrink
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.region import LossFn, Region
from jaxscale.parallel.sequence.fpdt.strategy import FullyPipelined
from jaxscale.parallel.sequence.layout import Chunked, TokenLayout
from jaxscale.rlhf.critic import CRITIC, CriticConfig
from jaxscale.rlhf.dpo import DpoLoss
from jaxscale.rlhf.policy import PolicyLoss
from jaxscale.rlhf.ppo import PpoLoss
from jaxscale.rlhf.rollouts import RolloutConfig
from jaxscale.run.fit import check_fit
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
    Raises:
        InputError: the data are pairs or prompts, or the model is not causal.
    """
    if run.data.is_paired:
        expected = (
            "dpo_loss or reward_loss for pairs: the next token's loss would learn rejected "
            "answers too"
        )
        raise InputError("Run.loss", "next_token_loss", expected)
    if run.data.is_prompted:
        expected = "policy_loss for prompts, which hold no answer to learn"
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
    Raises:
        InputError: the model is causal, or a setting is out of its bounds.
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
    Raises:
        InputError: the data are no pairs, the mesh has a pipeline, the model is not causal or has
            no adapters, more than they is trained, or a setting is out of its bounds.
    """
    check_pairs(run, "dpo_loss")
    check_reference(run, "dpo_loss")
    return DpoLoss(
        model=run.model,
        policy=run.policy,
        execution=run.execution,
        beta=beta,
        label_smoothing=label_smoothing,
    )


def policy_loss(run: "Run", *, beta: float = 0.04) -> LossFn:
    """The loss of answers that the model wrote, by their rewards, see `rlhf.policy.PolicyLoss`.

    Args:
        run: whose model learns from `rollouts`.
        beta: price of the divergence from the reference; 0 asks for no reference and no adapters.
    Raises:
        InputError: the run has no rollouts or no prompts, the mesh has a pipeline, the model is not
            causal, or beta is above 0 and more than adapters is trained.
    """
    check_rollouts(run, "policy_loss")
    if run.rollouts.num_answers < 2:
        expected = "2 or more for policy_loss: an answer is compared with the others to its prompt"
        raise InputError("RolloutConfig.num_answers", run.rollouts.num_answers, expected)
    loss = PolicyLoss(model=run.model, policy=run.policy, execution=run.execution, beta=beta)
    if beta:
        check_reference(run, "policy_loss with beta above 0")
    return loss


def check_rollouts(run: "Run", loss: str) -> None:
    """Raises InputError unless the run writes answers, and its devices have whole ones."""
    if run.rollouts is None:
        raise InputError("Run.rollouts", None, f"RolloutConfig(...) for {loss}")
    if not run.data.is_prompted:
        raise InputError("DataConfig.sources", run.data.sources, f"PromptSource for {loss}")
    _check_no_pipeline(run, loss)


def check_pairs(run: "Run", loss: str) -> None:
    """Raises InputError unless the run has pairs for a loss, and its devices whole answers."""
    if not run.data.is_paired:
        raise InputError("DataConfig.sources", run.data.sources, f"PreferenceSource for {loss}")
    _check_no_pipeline(run, loss)


def _check_no_pipeline(run: "Run", loss: str) -> None:
    if run.mesh.pipeline > 1:
        expected = f"1 for {loss}, which stages of a pipeline cannot run"
        raise InputError("MeshConfig.pipeline", run.mesh.pipeline, expected)


def check_reference(run: "Run", loss: str) -> None:
    """Refuses to train what lies beneath the adapters, which is the reference."""
    allowed = rf"{TRAINABLE}|{CRITIC}/.*"
    others = [path for path in trained_paths(run) if not re.fullmatch(allowed, path)]
    if others:
        expected = f"adapters alone, {TRAINABLE!r}, for {loss}: the rest is the reference"
        raise InputError("TrainConfig.trainable", run.train.trainable, expected)


def trained_paths(run: "Run") -> list[str]:
    """Paths of the parameters that are trained."""
    return list(tree.flatten(tree.select(run.table(), run.train.trainable)))


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
        rollouts: what the model writes in each step to learn from, for `policy_loss` and
            `ppo_loss`; None where it reads what there is.
        critic: what expects rewards, for `ppo_loss`.
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
    rollouts: RolloutConfig | None = None
    critic: CriticConfig | None = None
    evaluators: dict[str, Callable] = dataclasses.field(default_factory=dict)
    reporters: tuple[Callable, ...] = (TensorBoard(),)

    def __post_init__(self):
        check_types(self)
        if not self.directory.strip():
            raise InputError("Run.directory", self.directory, "the name of a folder")
        if not isinstance(self.mesh, MeshConfig):
            if self.critic is not None:
                expected = "MeshConfig(...) with Run.critic, of which no planner knows"
                raise InputError("Run.mesh", type(self.mesh).__name__, expected)
            planned = self.mesh(self)
            for name in ("mesh", "train", "execution"):
                object.__setattr__(self, name, getattr(planned, name))

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.directory).expanduser()

    def table(self) -> Table:
        """The parameter table of all that is trained: the model's, and a critic's as a section."""
        table = parameter_table(self.model)
        return table if self.critic is None else table | {CRITIC: self.critic.table()}

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
        if self.critic is not None:
            run.check_critic(setup.loss_fn)
        return setup

    def check_critic(self, loss_fn: LossFn) -> None:
        """Raises InputError unless the loss teaches the critic, and it fits the run."""
        if not isinstance(loss_fn, PpoLoss):
            expected = f"None with {type(loss_fn).__name__}: ppo_loss alone teaches a critic"
            raise InputError("Run.critic", "CriticConfig(...)", expected)
        if self.critic.init_from is not None and self.train.init_changes is not None:
            expected = "None with TrainConfig.init_changes: the critic is of the other run, too"
            raise InputError("CriticConfig.init_from", self.critic.init_from, expected)
        wanted = {"vocab_size": self.model.vocab_size, "max_length": self.data.sequence_length}
        for name, least in wanted.items():
            if (given := getattr(self.critic.model, name)) < least:
                expected = f"at least {least}, for it reads what the policy writes"
                raise InputError(f"CriticConfig.model.{name}", given, expected)
        check_fit(dataclasses.replace(self, model=self.critic.model))

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
