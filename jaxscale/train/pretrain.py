"""`pretrain`: one gin file to a trained model, from scratch or from where the last run stopped."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints
from jaxscale.data.loader import DataConfig, make_loader
from jaxscale.data.tokenizer import check_vocabulary, load_tokenizer
from jaxscale.launch.preemption import Preemption
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.launch.watchdog import Watchdog
from jaxscale.models.config import ModelConfig, checkpoint_facts, training_flops_per_token
from jaxscale.models.parameters import count_parameters
from jaxscale.models.transformer import StackConfig
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import abstract_batch, batch_share, place
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.parallel.region import LossFn
from jaxscale.train import diagnosis
from jaxscale.train.evaluation import EvaluationContext, check_evaluators
from jaxscale.train.loop import Loop, Outcome
from jaxscale.train.losses import NextTokenLoss
from jaxscale.train.metrics import History, ProgressBar, Reporter, Speed, TensorBoard, peak_flops
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.plan import Plan, TrainConfig, deterministic_stack, make_plan
from jaxscale.train.profiler import Profiler
from jaxscale.train.run_directory import check_new, held, write_start
from jaxscale.train.state import TrainState, init_state, run_key
from jaxscale.train.step import make_step
from jaxscale.types import Batch, InputError, Params

logger = logging.getLogger(__name__)


def pretrain(
    *,
    directory: str,
    model: ModelConfig,
    mesh: MeshConfig,
    data: DataConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    checkpoint: CheckpointConfig,
    policy: Policy = Policy(),
    stack: StackConfig = StackConfig(),
    runtime: RuntimeConfig = RuntimeConfig(),
    evaluators: dict[str, Callable] | None = None,
    make_loss: Callable[..., LossFn] = NextTokenLoss,
) -> Outcome:
    """Trains a model; a run that was stopped goes on from its newest checkpoint, on whatever mesh is asked now.

    Args:
        directory: of the run: its configuration, metrics, checkpoints and profile.
        model: the model.
        mesh: axis sizes and ZeRO level.
        data: sources, tokenizer, sequence length and global batch size.
        optimizer: optimizer and schedule.
        train: steps, micro-batches, seed.
        checkpoint: its directory is relative to `directory`.
        policy: dtypes.
        stack: how the layers are executed.
        runtime: platform, flags, processes and watchdog.
        evaluators: name -> evaluator(context) -> figures, see `train.evaluation`.
        make_loss: (model, policy, stack, z_loss and, of a run that has it, embedding_noise), by
            keyword, -> a loss under the contract of `train.losses`.
    Returns:
        The steps finished and the signal that ended the run early, if any.
    Raises:
        InputError: before anything on disk is touched, when something does not fit.
        NonFiniteError: a loss or gradient norm was not finite.
        RunError: this process could not join the run's others.
    """
    run = Path(directory).expanduser()
    if runtime.is_deterministic:
        stack = deterministic_stack(stack, data.sequence_length)
    apply_runtime(runtime, str(run))
    plan = make_plan(
        model=model,
        mesh=mesh,
        data=data,
        optimizer=optimizer,
        train=train,
        policy=policy,
        stack=stack,
        make_loss=make_loss,
    )
    check_vocabulary(load_tokenizer(data.tokenizer), model.vocab_size)
    checkpoints = Checkpoints(checkpoint.within(run), **checkpoint_facts(model))
    evaluate = _make_evaluate(plan, model, evaluators or {})
    index, count = batch_share(plan.mesh)
    loader = make_loader(data, split="train", process_index=index, process_count=count)
    with (
        Preemption() as preemption,
        Watchdog(runtime.watchdog_s(jax.process_count())) as watchdog,
        held(run),
        contextlib.ExitStack() as exit_stack,  # closes each, whichever of them fails
    ):
        exit_stack.callback(checkpoints.close)
        watchdog.watch("the restore or first draw of the state", is_slow=True)
        if checkpoints.latest_step() is None:
            check_new(run, checkpoint.directory)
        state = _restore_or_start(plan, checkpoints, loader, model, train)
        if int(state.step) >= train.steps:
            logger.info("nothing to do: step %d of %d", int(state.step), train.steps)
            return Outcome(int(state.step), None)
        checkpoints.check_writable()
        step_fn = _make_traced_step(plan, data)
        write_start(run, int(state.step), checkpoint.directory)
        loop = Loop(
            step_fn=step_fn,
            loader=loader,
            place=functools.partial(place, plan.mesh),
            steps=train.steps,
            checkpoints=_CanonicalCheckpoints(checkpoints, plan),
            save_every=checkpoint.save_every,
            reporters=_make_reporters(run, train.steps, int(state.step)),
            speed=_make_speed(model, data),
            evaluate=evaluate,
            evaluate_every=train.evaluate_every,
            diagnose=functools.partial(_diagnose, plan),
            preemption=preemption,
            profiler=Profiler(train.profile_steps, run / "profile"),
            watchdog=watchdog,
        )
        for resource in (*loop.reporters, loop.profiler):
            exit_stack.callback(resource.close)
        return loop.run(state)


def _make_traced_step(plan: Plan, data: DataConfig) -> Callable:
    """What refuses only when it is traced does so here, before a file changes; the first step finds the trace again."""
    step = make_step(plan.loss_fn, plan.optimizer, plan.region, plan.state)
    step.trace(
        plan.state,
        abstract_batch(plan.mesh, data.batch_size, data.sequence_length, is_packed=data.is_packed),
    )
    return step


@dataclasses.dataclass(frozen=True)
class _CanonicalCheckpoints:
    """Saves states as they are on disk, whatever order a pipeline runs the layers in; see `loop.Saver`."""

    checkpoints: Checkpoints
    plan: Plan

    def save(
        self, step: int, state: TrainState, data_state: dict[str, Any], *, force: bool = False
    ) -> bool:
        return self.checkpoints.save(step, self.plan.to_canonical(state), data_state, force=force)

    def wait(self) -> None:
        self.checkpoints.wait()


def _restore_or_start(
    plan: Plan, checkpoints: Checkpoints, loader: Any, model: ModelConfig, train: TrainConfig
):
    """Resume, else the parameters of another run, else a fresh draw."""
    if checkpoints.latest_step() is not None:
        saved, data_state = checkpoints.restore(plan.canonical_state)
        state = plan.from_canonical(saved)
        loader.restore(data_state)
        if (jax.random.key_data(state.key) != jax.random.key_data(run_key(train.seed))).any():
            raise InputError(
                "TrainConfig.seed", train.seed, "the seed with which the run was begun"
            )
        logger.info("resumed after step %d", int(state.step))
        return state
    state = init_state(
        model,
        plan.optimizer,
        plan.state,
        specs=plan.region.specs,
        seed=train.seed,
        trainable=train.trainable,
    )
    if train.init_from is None:
        return state
    config = CheckpointConfig(directory=train.init_from, save_every=1, keep_last=1)
    with contextlib.closing(Checkpoints(config, **checkpoint_facts(model))) as source:
        if source.latest_step() is None:
            hints = [
                f"; {path.parent} has"
                for path in Path(train.init_from).expanduser().glob("*/[0-9]*")
            ][:1]
            expected = f"a folder with a checkpoint; there is none{''.join(hints)}"
            raise InputError("TrainConfig.init_from", train.init_from, expected)
        params = source.restore_params(plan.canonical_state.params)
        return dataclasses.replace(state, params=plan.params_from_canonical(params))


def _make_reporters(directory: Path, steps: int, step: int) -> list[Reporter]:
    """Only the first process reports."""
    if jax.process_index() != 0:
        return []
    return [
        History(directory / "metrics.jsonl", step),
        TensorBoard(directory / "tensorboard", step),
        ProgressBar(steps, step),
    ]


def _make_speed(model: ModelConfig, data: DataConfig) -> Speed:
    peak = peak_flops()
    kind = jax.local_devices()[0].device_kind
    against = (
        f"measured against {peak / 1e12:.0f} TFLOP/s (dense bf16)"
        if peak
        else "left out: its peak is not known"
    )
    logger.info("MFU of a %s is %s", kind, against)
    flops = training_flops_per_token(model, count_parameters(model)[1], data.sequence_length)
    return Speed(data.batch_size * data.sequence_length, flops)


def _make_evaluate(plan: Plan, model: ModelConfig, evaluators: dict[str, Callable]) -> Callable:
    context = EvaluationContext(
        params=None,
        step=0,
        model=model,
        mesh=plan.mesh,
        sums=jax.jit(plan.region.evaluate(plan.loss_fn)),
        place=functools.partial(place, plan.mesh),
    )
    check_evaluators(evaluators, context)

    def evaluate(params: Params, step: int) -> dict[str, Any]:
        now = dataclasses.replace(context, params=params, step=step)
        return {
            f"{name}/{figure}": value
            for name, evaluator in evaluators.items()
            for figure, value in evaluator(now).items()
        }

    return evaluate


def _diagnose(plan: Plan, state: TrainState, batch: Batch) -> str:
    key = jax.random.fold_in(state.key, state.step)
    return diagnosis.first_non_finite(plan.loss_fn, plan.region, state.params, batch, key)
