"""What surrounds a run: platform and processes, its directory's lock, signals and the watchdog."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxscale.launch.preemption import Preemption
from jaxscale.launch.runtime import RuntimeConfig, apply_runtime
from jaxscale.launch.watchdog import Watchdog
from jaxscale.train.run_directory import held


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a run is in the midst of.

    Args:
        directory: of the run.
        runtime: its settings.
        preemption: hears signals.
        exit_stack: closes whatever is pushed on it when the run ends, however it ends.
    """

    directory: Path
    runtime: RuntimeConfig
    preemption: Preemption
    exit_stack: contextlib.ExitStack

    def begin(self) -> Watchdog:
        """Locks the directory and starts the watchdog; from now on files change.

        Raises:
            InputError: another run holds the directory, or it cannot be written.
        """
        enter = self.exit_stack.enter_context
        watchdog = enter(Watchdog(self.runtime.watchdog_s(jax.process_count())))
        enter(held(self.directory))
        return watchdog


@contextlib.contextmanager
def surroundings(directory: Path, runtime: RuntimeConfig) -> Iterator[Surroundings]:
    """Applies the runtime's settings and joins the run's processes; nothing on disk changes yet.

    Signals are heard from the first moment.

    Between this and `Surroundings.begin` a run is checked, so that bad input ends before anything
    is written.

    Raises:
        InputError: this machine or process cannot do what `runtime` asks for.
        RunError: this process could not join the others.
    """
    with Preemption() as preemption:
        apply_runtime(runtime, str(directory))
        with contextlib.ExitStack() as exit_stack:
            yield Surroundings(directory, runtime, preemption, exit_stack)
