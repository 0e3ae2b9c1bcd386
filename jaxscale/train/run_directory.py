"""A run's directory: held by one run at a time, with what a rerun needs."""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import jax

import jaxscale
from jaxscale.checkpoint.steps import committed_steps
from jaxscale.config import operative_config
from jaxscale.train.metrics import writing
from jaxscale.types import InputError
from jaxscale.verbs import VERBS
from jaxscale.written import fields_of

logger = logging.getLogger(__name__)

# What a run cannot change when it goes on, and why.
FIXED = {
    "OptimizerConfig.name": "the saved optimizer state is of that optimizer",
    "TrainConfig.trainable": "the saved optimizer state is of those parameters",
    # The schedule's step is the number of updates, which is saved, over this.
    "ppo_loss.num_epochs": "the saved optimizer state counts so many updates a step",
}
LOCK, STARTS, CONFIG = ".lock", "starts.jsonl", "config.gin"
WITHOUT_LOCKS = {
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
}  # how a file system says that it has none


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keeps other runs out of `directory`.

    It is made if need be, and removed again if nothing was written to it.

    The system lets go of it when this process ends, however it ends. Only the run's first process
    takes it.

    Raises:
        InputError: another run holds it, or it cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError("directory", str(directory), "a folder; this is a file")
    if jax.process_index() != 0:
        yield
        return
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("ab")
    with file:
        _lock(file, directory)
        try:
            yield
        finally:
            if [path.name for path in directory.iterdir()] == [LOCK]:
                (directory / LOCK).unlink()
                for path in missing:
                    path.rmdir()


def _lock(file: BinaryIO, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            "directory", str(directory), "a directory where no other process is training"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        logger.warning("%s cannot be locked: nothing keeps a second run out of it", directory)


def check_new(directory: Path, checkpoints: str) -> None:
    """Refuses to begin a run anew where an earlier start of it left checkpoints elsewhere.

    Its history would begin anew too.

    Args:
        directory: of the run.
        checkpoints: their directory now, relative to `directory`; it has none.
    Raises:
        InputError: names the directory that has them.
    """
    path = directory / STARTS
    lines = path.read_text().splitlines() if path.exists() else []
    starts = [json.loads(line) for line in reversed(lines)]
    places = [start["checkpoints"] for start in starts if "checkpoints" in start]
    for before in dict.fromkeys(places):
        if steps := committed_steps(directory / before):
            expected = (
                f"{before!r}, where the run of {directory} has step {steps[-1]}; another directory "
                "begins another run"
            )
            raise InputError("CheckpointConfig.directory", checkpoints, expected)


def changes(directory: Path) -> list[str]:
    """What the configuration changes in a run that goes on, a line a field.

    Nothing is known where either start had no configuration file.

    Raises:
        InputError: a field changes that the saved state depends on.
    """
    path, text = directory / CONFIG, operative_config()
    if not (text and path.exists()):
        return []
    before, now = fields_of(path.read_text()), fields_of(text)
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = (fields.get(name, "(absent)") for fields in (before, now))
        if old == new or name == "Run.directory":
            continue
        if name in FIXED:
            raise InputError(name, new, f"{old}, with which the run was begun: {FIXED[name]}")
        if _is_of_a_verb(name):
            continue
        lines.append(f"{name} {old} -> {new}")
    return lines


def _is_of_a_verb(name: str) -> bool:
    owner, _ = name.split("/")[-1].split(".")
    return owner in {verb.function.split(":")[1] for verb in VERBS.values()}


def write_start(
    directory: Path,
    step: int,
    checkpoints: str,
) -> None:
    """Writes the configuration, and a line with versions and command; first process only.

    The configuration is written twice, once under a name of this start.

    Args:
        directory: of the run.
        step: finished steps of the state the run starts from.
        checkpoints: their directory, relative to `directory`.
    Raises:
        InputError: `directory` cannot be written.
    """
    if jax.process_index() != 0:
        return
    start = {
        "step": step,
        "command": sys.argv,
        "checkpoints": checkpoints,
        "jaxscale": jaxscale.__version__,
        "python": platform.python_version(),
        **{
            name: importlib.metadata.version(name)
            for name in ("jax", "flax", "optax", "orbax-checkpoint")
        },
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }
    with writing(directory):
        if text := operative_config():  # there is none when Python code calls
            for name in (f"config.{step}.gin", CONFIG):
                temporary = (
                    directory / f"{name}.tmp"
                )  # renamed when whole: a full disk must not cost the old one
                temporary.write_text(text)
                temporary.replace(directory / name)
        with (directory / STARTS).open("a") as file:
            file.write(json.dumps(start) + "\n")
