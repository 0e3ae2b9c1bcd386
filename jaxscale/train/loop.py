"""The training loop: step, report one step late, checkpoint and evaluate when due, stop cleanly."""

import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxscale.launch.watchdog import Watchdog
from jaxscale.train.metrics import Speed, expert_use
from jaxscale.train.profiler import Profiler
from jaxscale.train.reporters import Reporter
from jaxscale.train.state import TrainState
from jaxscale.types import Batch, Params, RunError


class NonFiniteError(RunError):
    """A loss, gradient norm or update was not finite; says at which step and in which tensor."""


class Loader(Protocol):
    """An endless, checkpointable source of host batches."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state(self) -> dict[str, Any]:
        """JSON-able position: what `restore` needs to go on after the batches handed out so far."""


class Saver(Protocol):
    """What the loop asks of checkpoints."""

    def save(
        self,
        step: int,
        state: Any,
        data_state: dict[str, Any],
        *,
        force: bool = False,
    ) -> Any:
        """Starts a save when one is due."""

    def wait(self) -> None:
        """Returns once everything is committed."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: the steps finished, and the signal that stopped it early, if one did."""

    step: int
    signal: signal.Signals | None

    @property
    def exit_status(self) -> int:
        """0, or 128 plus the signal's number as shells report it."""
        return 0 if self.signal is None else 128 + self.signal


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A dispatched step whose figures have not been fetched."""

    step: int
    metrics: dict[str, jax.Array]
    batch: Batch
    data_state: dict[str, Any]
    figures: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Loop:
    """Everything a run does between its first and its last step.

    Args:
        step_fn: (state, batch) -> (state, metrics), the state donated.
        loader: host batches.
        prepare: (parameters, host batch) -> (batch on the mesh, figures of how it came about).
        steps: total, counted from the run's very first.
        checkpoints: see `Saver`.
        save_every: steps between checkpoints.
        reporters: told the figures of every step.
        speed: throughput between steps.
        evaluate: (params, step) -> figures.
        evaluate_every: steps between evaluations; the last step is always evaluated.
        norm: of parameters; not finite where one is broken.
        diagnose: (state, batch) -> name of the first tensor that is not finite.
        preemption: says when a signal asks for the end; protected from the first step on.
        profiler: records a window of steps.
        watchdog: told what begins.
    """

    step_fn: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    loader: Loader
    prepare: Callable[[Params, Batch], tuple[Batch, dict[str, Any]]]
    steps: int
    checkpoints: Saver
    save_every: int
    reporters: Sequence[Reporter]
    speed: Speed
    evaluate: Callable[[Any, int], dict[str, Any]]
    evaluate_every: int
    norm: Callable[[Any], jax.Array]
    diagnose: Callable[[TrainState, Batch], str]
    preemption: Any
    profiler: Profiler
    watchdog: Watchdog

    def run(self, state: TrainState) -> Outcome:
        """Trains from `state` (donated) to the last step or a signal, and commits a checkpoint.

        Raises:
            NonFiniteError: the state before the bad step has been saved, unless it was an update
                that broke it.
        """
        pending = None
        first = int(state.step) + 1
        for step in range(first, self.steps + 1):
            # The first is compiled, and its figures are waited for in the second.
            self.watchdog.watch(f"step {step}", is_slow=step <= first + 1)
            self.profiler.update(step - 1, state)
            state, started = self._start(state, step)
            self.preemption.protect()  # until here nothing was lost that a restart would not repeat
            self._report(pending, state)
            pending = started
            if step == self.steps or step % self.evaluate_every == 0 or step % self.save_every == 0:
                self._report(pending, state)
                pending = None
                self._evaluate_and_save(state, step)
            if self.preemption.is_requested():
                break
        self._report(pending, state)
        self.watchdog.watch("the last checkpoint", is_slow=True)
        self.profiler.close()
        self._save(int(state.step), state, self.loader.state(), force=True)
        self.checkpoints.wait()
        is_complete = int(state.step) == self.steps
        return Outcome(int(state.step), None if is_complete else self.preemption.received)

    def _start(self, state: TrainState, step: int) -> tuple[TrainState, _Pending]:
        before, data_state = time.perf_counter(), self.loader.state()
        batch = next(self.loader)
        figures = {"data_wait_s": time.perf_counter() - before}
        batch, of_batch = self.prepare(state.params, batch)
        state, metrics = self.step_fn(state, batch)
        return state, _Pending(step, metrics, batch, data_state, figures | of_batch)

    def _report(self, pending: _Pending | None, state: TrainState) -> None:
        """Fetches a step's figures while the next one runs."""
        if pending is None:
            return
        figures = {
            name: _host_value(value) for name, value in jax.device_get(pending.metrics).items()
        }
        if not figures.pop("is_finite"):
            self._stop_non_finite(pending, state)
        figures |= self.speed.figures() | pending.figures
        figures |= expert_use(figures["load"]) if "load" in figures else {}
        for reporter in self.reporters:
            reporter.report(pending.step, figures)

    def _stop_non_finite(self, pending: _Pending, state: TrainState) -> None:
        """`state` is what it was before the bad step, and is saved before it is looked at."""
        self.watchdog.watch(f"the checkpoint before step {pending.step}", is_slow=True)
        good = dataclasses.replace(state, is_finite=jnp.ones_like(state.is_finite))
        self._save(pending.step - 1, good, pending.data_state, force=True)
        self.checkpoints.wait()
        self.watchdog.watch(f"the diagnosis of step {pending.step}", is_slow=True)
        raise NonFiniteError(
            f"step {pending.step}: loss {pending.metrics['loss']}, "
            f"gradient norm {pending.metrics['gradient_norm']}; "
            f"first non-finite: {self._name_tensor(state, pending.batch)}; "
            f"the state after step {pending.step - 1} is saved"
        )

    def _save(
        self,
        step: int,
        state: TrainState,
        data_state: dict[str, Any],
        *,
        force: bool = False,
    ) -> None:
        """Saves unless an update has broken the parameters, which no step has used yet."""
        if not jnp.isfinite(self.norm(state.params)):
            raise NonFiniteError(
                f"step {step}: the update was not finite; the last good state is that of the "
                "newest checkpoint"
            )
        self.checkpoints.save(step, state, data_state, force=force)

    def _name_tensor(self, state: TrainState, batch: Batch) -> str:
        try:
            return self.diagnose(state, batch)
        except jax.errors.JaxRuntimeError as error:  # it may need more memory than the step
            return f"unknown, for the diagnosis failed ({str(error).splitlines()[0]})"

    def _evaluate_and_save(self, state: TrainState, step: int) -> None:
        """Evaluates, then saves, so that a committed step has all its figures in the history.

        A step whose evaluation fails is saved too, and lacks them.
        """
        try:
            if step % self.evaluate_every == 0 or step == self.steps:
                self._evaluate(state, step)
        finally:
            self.watchdog.watch(f"the checkpoint of step {step}", is_slow=True)
            self._save(step, state, self.loader.state())

    def _evaluate(self, state: TrainState, step: int) -> None:
        self.watchdog.watch(f"the evaluation after step {step}", is_slow=True)
        figures = self.evaluate(state.params, step)
        for reporter in self.reporters if figures else ():
            reporter.report(step, figures)
        self.speed.figures()  # restarts the clock: evaluation is not training time


def _host_value(value: Any) -> Any:
    return value.item() if value.ndim == 0 else value
