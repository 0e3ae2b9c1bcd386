"""Where a run's figures go beside its history: TensorBoard, Weights & Biases, whatever reports."""

import dataclasses
import importlib.util
import secrets
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import text as text_summary

from jaxscale.train.metrics import writing
from jaxscale.train.run_directory import CONFIG
from jaxscale.types import InputError, check_built, check_types


class Reporter(Protocol):
    """Takes the figures of one step.

    What a run binds is called `(directory, step) -> Reporter` by its first process when the run
    begins: the run's directory, and the finished steps that it starts from. One that also has
    `check()` is asked before the run writes anything, and raises InputError where it cannot report.
    """

    def report(self, step: int, figures: Mapping[str, Any]) -> None:
        """Records the figures of a finished step: numbers, texts and arrays by name."""

    def close(self) -> None:
        """Flushes what is buffered."""


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """Scalars and texts for TensorBoard, in the folder `tensorboard` of the run's directory."""

    def __call__(self, directory: Path, step: int) -> "EventFile":
        """The reporter of a run that goes on after `step` steps, see `Reporter`."""
        return EventFile(directory / "tensorboard", step)


class EventFile:
    """A new file of TensorBoard for each start, written as the figures come by no thread.

    Args:
        directory: where the files are.
        step: finished steps of the state the run starts from; TensorBoard hides what earlier files
            have after it.
    """

    def __init__(self, directory: Path, step: int):
        self._path = directory / f"events.out.tfevents.{time.time_ns()}"
        with writing(self._path):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("xb")
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def report(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes the scalars, and each text in a record of its own."""
        values = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in scalars(figures).items()
        ]
        self._write(Event(step=step, summary=Summary(value=values)))
        for name, text in texts(figures).items():
            self._write(Event(step=step, summary=text_summary(name, text)))

    def close(self) -> None:
        """Closes the file."""
        with writing(self._path):
            self._file.close()

    def _write(self, event: Event) -> None:
        """Appends a record: length, its checksum, event, its checksum."""
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        with writing(self._path):
            self._file.write(length + checksums[0] + data + checksums[1])
            self._file.flush()


@dataclasses.dataclass(frozen=True)
class Wandb:
    """Scalars and texts for Weights & Biases; needs the extra `wandb`.

    A run that is resumed goes on under the same id, which stands in the run's directory. Its
    environment variables (WANDB_MODE, WANDB_ENTITY ...) count.

    Args:
        project: in which the run is shown.
        name: of the run; the name of its directory when None.
    """

    project: str
    name: str | None = None

    def __post_init__(self):
        check_types(self)

    def check(self) -> None:
        """Raises InputError unless the package is installed."""
        if importlib.util.find_spec("wandb") is None:
            raise InputError("Wandb", "no wandb", "the extra: pip install 'jaxscale[wandb]'")

    def __call__(self, directory: Path, step: int) -> "WandbRun":
        """The reporter of a run, see `Reporter`; `step` is not read, for figures bring theirs."""
        return WandbRun(self, directory)


class WandbRun:
    """A run of Weights & Biases, whose steps are those of the figures.

    A resumed run repeats steps; wandb's own count of steps, which only grows, would drop them.

    Args:
        config: project and name.
        directory: of the run.
    """

    def __init__(self, config: Wandb, directory: Path):
        import wandb

        path, settings = directory / "wandb_id", directory / CONFIG
        if not path.exists():
            with writing(path):
                path.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=config.project,
            name=config.name or directory.resolve().name,
            dir=str(directory),
            id=path.read_text(),
            resume="allow",
            config={CONFIG: settings.read_text()} if settings.exists() else {},
        )
        self._run.define_metric("*", step_metric="step")

    def report(self, step: int, figures: Mapping[str, Any]) -> None:
        """Logs the scalars and texts."""
        self._run.log({"step": step, **scalars(figures), **texts(figures)})

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


def check_reporters(reporters: Sequence[Callable[[Path, int], Reporter]]) -> None:
    """Raises InputError for a reporter that was not built or says that it cannot report."""
    for number, reporter in enumerate(reporters):
        check_built(f"reporters[{number}]", reporter)
        getattr(reporter, "check", lambda: None)()


def scalars(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the figures that are one number."""
    return {
        name: value
        for name, value in figures.items()
        if not isinstance(value, str) and np.ndim(value) == 0
    }


def texts(figures: Mapping[str, Any]) -> dict[str, str]:
    """Those of the figures that are text, such as samples."""
    return {name: value for name, value in figures.items() if isinstance(value, str)}
