"""Training of any model: from its newest checkpoint or from the start to the last step."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax

from jaxscale import tree
from jaxscale.checkpoint.deepspeed_writer import adam_states
from jaxscale.checkpoint.exports import export, is_exported
from jaxscale.checkpoint.manager import BUDGET_BYTES, CheckpointConfig, Checkpoints
from jaxscale.checkpoint.native import NativeCheckpoint
from jaxscale.launch.memory import check_fits
from jaxscale.launch.watchdog import Watchdog
from jaxscale.parallel.batch import place
from jaxscale.train import diagnosis
from jaxscale.train.config import TrainConfig
from jaxscale.train.loop import Loader, Loop, Outcome
from jaxscale.train.metrics import HISTORY, History, Speed, history_lines, peak_flops
from jaxscale.train.profiler import Profiler
from jaxscale.train.reporters import Reporter
from jaxscale.train.run_directory import changes, check_new, write_start
from jaxscale.train.setup import Setup
from jaxscale.train.state import TrainState, run_key
from jaxscale.train.step import make_step
from jaxscale.train.surroundings import Surroundings
from jaxscale.train.terminal import make_progress
from jaxscale.types import Batch, InputError, Params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """What the parameters of a new run's model start from.

    Args:
        parameter: what a user binds `directory` by.
        directory: of another run's checkpoints; None to draw them.
        facts: which model a checkpoint is of, as `Checkpoints` takes them.
    """

    parameter: str
    directory: str | None
    facts: dict[str, Any]


class ResumableLoader(Loader, Protocol):
    """A loader that can go on from a saved position."""

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on after the batches handed out when `state` was asked for."""


def train(
    setup: Setup,
    *,
    loader: ResumableLoader,
    batch: Batch,
    config: TrainConfig,
    checkpoint: CheckpointConfig,
    facts: dict[str, Any],
    surroundings: Surroundings,
    speed: Speed,
    prepare: Callable[[Params, Batch], tuple[Batch, dict[str, Any]]] | None = None,
    sections: Mapping[str, Source] = MappingProxyType({}),
    evaluate: Callable[[Params, int], dict[str, Any]] = lambda params, step: {},
    reporters: Sequence[Callable[[Path, int], Reporter]] = (),
    announce: Callable[[], None] = lambda: None,
) -> Outcome:
    """Trains a model; a run that was stopped goes on from its newest checkpoint, on any mesh.

    Args:
        setup: model, loss, mesh and optimizer.
        loader: host batches, this process's share of the rows.
        batch: a global batch as shapes with shardings.
        config: steps, seed and what a new run starts from.
        checkpoint: where and how often to save, relative to the run's directory.
        facts: which model a checkpoint is of, as `Checkpoints` takes them.
        surroundings: of the run.
        speed: throughput between steps.
        prepare: (params, host batch) -> (batch on the mesh, figures); None places the batch.
        sections: of the parameters that are a model of their own, with what each starts from in a
            new run; `config.init_from` has the rest.
        evaluate: (params, step) -> figures.
        reporters: what gets the figures beside `metrics.jsonl` and the terminal, see
            `train.reporters.Reporter`.
        announce: called before the first step, when nothing can be refused any more.
    Returns:
        The steps finished and the signal that ended the run early, if any.
    Raises:
        InputError: before anything on disk is touched, when something does not fit.
        NonFiniteError: a loss or gradient norm was not finite.
    """
    run = surroundings.directory
    folder = Path(checkpoint.within(run).directory)
    checkpoints = Checkpoints(checkpoint.within(run), **facts)
    watchdog = _begin(surroundings, checkpoints)
    watchdog.watch("the restore or first draw of the state", is_slow=True)
    checkpoints.fetch()
    changed = _changes_since_the_last_start(run, checkpoints, checkpoint.directory)
    history_lines(run / HISTORY)  # refuses what the history could not go on in
    check_fits("model", setup.resting())
    sources = {"": Source("TrainConfig.init_from", config.init_from, facts), **sections}
    state = _restore_or_start(setup, checkpoints, loader, config, sources)
    for line in changed:
        logger.info("changed since the last start: %s", line)
    first_step = int(state.step)
    if first_step >= config.steps:
        logger.info("nothing to do: step %d of %d", first_step, config.steps)
        _export(checkpoints, folder, run, config, first_step)
        return Outcome(first_step, None)
    if config.export == "deepspeed":
        adam_states(tree.flatten(setup.canonical_state))  # refuses what cannot be exported
    checkpoints.prepare(setup.canonical_state)
    step_fn = make_step(setup)
    # What refuses only when it is traced does so here, before a file changes. The first step finds
    # the trace again.
    step_fn.trace(setup.state, batch)
    write_start(run, first_step, checkpoint.directory)
    announce()
    _say_what_mfu_is_of()
    loop = Loop(
        step_fn=step_fn,
        loader=loader,
        prepare=prepare or functools.partial(_placed, setup),
        steps=config.steps,
        checkpoints=_CanonicalCheckpoints(checkpoints, setup, folder),
        save_every=checkpoint.save_every,
        reporters=_open_reporters(reporters, run, config.steps, first_step),
        speed=speed,
        evaluate=evaluate,
        evaluate_every=config.evaluate_every,
        norm=jax.jit(setup.norm),
        diagnose=functools.partial(_diagnose, setup),
        preemption=surroundings.preemption,
        profiler=Profiler(config.profile_steps, run / "profile"),
        watchdog=watchdog,
    )
    for resource in (*loop.reporters, loop.profiler):
        surroundings.exit_stack.callback(resource.close)
    outcome = loop.run(state)
    _export(checkpoints, folder, run, config, outcome.step)
    return outcome


def _begin(surroundings: Surroundings, checkpoints: Checkpoints) -> Watchdog:
    """Begins the run's surroundings, at whose end the checkpoints are closed."""
    with contextlib.ExitStack() as opened:
        opened.callback(checkpoints.close)
        watchdog = surroundings.begin()
        # Closed before the directory's lock is given up, for until then a save may be written.
        surroundings.exit_stack.callback(opened.pop_all().close)
    return watchdog


def _changes_since_the_last_start(
    run: Path,
    checkpoints: Checkpoints,
    directory: str,
) -> list[str]:
    """A line for each field that a resume changes; refuses a new run where an old one has been."""
    if checkpoints.latest_step() is not None:
        return changes(run)
    check_new(run, directory)
    return []


def _export(
    checkpoints: Checkpoints,
    folder: Path,
    run: Path,
    config: TrainConfig,
    step: int,
) -> None:
    """Writes the last checkpoint of a finished run as another system's, too.

    A run that was killed meanwhile, or is asked for it once it is finished, gets it at its next
    start.
    """
    if config.export is None or step != config.steps or jax.process_index() > 0:
        return
    to = run / config.export
    if is_exported(to, kind=config.export, step=step):
        return
    checkpoints.wait()
    leaves = NativeCheckpoint(folder / str(step)).leaves()
    if config.export == "safetensors":
        leaves = {path: leaf for path, leaf in leaves.items() if path.startswith("params/")}
    export(leaves, to, kind=config.export, step=step, budget_bytes=BUDGET_BYTES)
    logger.info("the last checkpoint is also in %s", to)


@dataclasses.dataclass(frozen=True)
class _CanonicalCheckpoints:
    """Saves states in the order of the layers, whatever order a pipeline runs them in.

    Says so of each; where a save then fails, the next one or the end of the run raises.
    """

    checkpoints: Checkpoints
    setup: Setup
    folder: Path

    def save(
        self,
        step: int,
        state: TrainState,
        data_state: dict[str, Any],
        *,
        force: bool = False,
    ) -> bool:
        canonical = self.setup.to_canonical(state)
        is_begun = self.checkpoints.save(step, canonical, data_state, force=force)
        if is_begun and jax.process_index() == 0:
            logger.info("step %d: saving to %s", step, self.folder / str(step))
        return is_begun

    def wait(self) -> None:
        self.checkpoints.wait()


def _restore_or_start(
    setup: Setup,
    checkpoints: Checkpoints,
    loader: ResumableLoader,
    config: TrainConfig,
    sources: Mapping[str, Source],
) -> TrainState:
    """Resume, else the parameters of other runs, else a fresh draw."""
    if checkpoints.latest_step() is not None:
        saved, data_state = checkpoints.restore(setup.canonical_state)
        state = setup.from_canonical(saved)
        _check_step(state, checkpoints.latest_step())
        loader.restore(data_state)
        _check_seed(state, config)
        logger.info("resumed after step %d", int(state.step))
        return state
    if config.init_changes is not None:
        return _other_state(setup, loader, config, sources[""])
    if all(source.directory is None for source in sources.values()):
        return setup.init(config.seed)
    nothing = jax.tree.map(lambda _: None, setup.canonical_state)
    params = _other_params(setup, sources)
    saved = dataclasses.replace(nothing, params=params)
    # What is not drawn is never there beside what is read.
    return setup.from_canonical(setup.draw_missing(config.seed, saved))


def _check_step(state: TrainState, folder: int) -> None:
    """Refuses a folder that does not bear the step in it: the next save could be in its way."""
    if int(state.step) != folder:
        expected = f"the name {state.step}, of the step in it: the folder was renamed"
        raise InputError("checkpoint.directory", f"a folder {folder}", expected)


def _other_state(
    setup: Setup,
    loader: ResumableLoader,
    config: TrainConfig,
    source: Source,
) -> TrainState:
    """The state of another run's newest checkpoint, but for what the changes name."""
    with contextlib.closing(_open_other(source)) as checkpoints:
        saved, data_state = checkpoints.restore_changed(setup.canonical_state, config.init_changes)
    # None where it is to be drawn; another system's checkpoint has no position in the data.
    if saved.step is not None and data_state:
        loader.restore(data_state)
    state = setup.from_canonical(setup.draw_missing(config.seed, saved))
    _check_seed(state, config)
    logger.info("goes on from %s after step %d", config.init_from, int(state.step))
    return state


def _check_seed(state: TrainState, config: TrainConfig) -> None:
    saved = jax.random.key_data(state.key)
    if (saved != jax.random.key_data(run_key(config.seed))).any():
        expected = "the seed with which the run was begun"
        raise InputError("TrainConfig.seed", config.seed, expected)


def _other_params(setup: Setup, sources: Mapping[str, Source]) -> Params:
    """Parameters from other runs' newest checkpoints, as on disk; None where they are drawn."""
    wanted = setup.canonical_state.params
    sections = {name: wanted[name] for name in sources if name}
    rest = {name: part for name, part in wanted.items() if name not in sections}
    found = {name: _other_section(part, sources[name]) for name, part in sections.items()}
    # The other run may have had the same sections.
    return _other_section(rest, sources[""], left_out=tuple(sections)) | found


def _other_section(wanted: Params, source: Source, left_out: tuple[str, ...] = ()) -> Params:
    if source.directory is None:
        return jax.tree.map(lambda _: None, wanted)
    with contextlib.closing(_open_other(source)) as checkpoints:
        return checkpoints.restore_params(wanted, left_out=left_out)


def _open_other(source: Source) -> Checkpoints:
    """The checkpoints of another run, of which there is one at least."""
    checkpoints = Checkpoints(_of_other(source.directory), **source.facts)
    if checkpoints.latest_step() is None:
        checkpoints.close()
        below = Path(source.directory).expanduser().glob("*/[0-9]*")
        hints = [f"; {path.parent} has" for path in below][:1]
        expected = f"a folder with a checkpoint; there is none{''.join(hints)}"
        raise InputError(source.parameter, source.directory, expected)
    return checkpoints


def _of_other(directory: str) -> CheckpointConfig:
    return CheckpointConfig(directory=directory, save_every=1, keep_last=1)


def _open_reporters(
    wanted: Sequence[Callable[[Path, int], Reporter]],
    directory: Path,
    steps: int,
    step: int,
) -> list[Reporter]:
    """Only the first process reports."""
    if jax.process_index() != 0:
        return []
    history = History(directory / HISTORY, step)
    others = [reporter(directory, step) for reporter in wanted]
    return [history, *others, make_progress(steps, step)]


def _say_what_mfu_is_of() -> None:
    kind, peak = jax.local_devices()[0].device_kind, peak_flops()
    against = "left out: its peak is not known"
    if peak:
        against = f"measured against {peak / 1e12:.0f} TFLOP/s (dense bf16)"
    logger.info("MFU of a %s is %s", kind, against)


def _placed(setup: Setup, params: Params, batch: Batch) -> tuple[Batch, dict[str, Any]]:
    return place(setup.mesh, batch), {}


def _diagnose(
    setup: Setup,
    state: TrainState,
    batch: Batch,
) -> str:
    key = jax.random.fold_in(state.key, state.step)
    return diagnosis.first_non_finite(setup, state.params, batch, key)
