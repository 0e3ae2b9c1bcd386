"""Run directories that are made of parameters, without a training."""

import contextlib
import dataclasses
import functools
import logging
from pathlib import Path

from jaxscale.checkpoint.manager import Checkpoints
from jaxscale.data.loader import DataConfig
from jaxscale.data.tokenizer import Tokenizer
from jaxscale.models.config.facts import checkpoint_facts
from jaxscale.run.run import Run
from jaxscale.train.run_directory import CONFIG
from jaxscale.types import InputError, Params
from jaxscale.written import as_written, render

logger = logging.getLogger(__name__)


def new_path(directory: str) -> Path:
    """The path of a directory; raises InputError if there is something."""
    path = Path(directory).expanduser()
    if path.exists():
        raise InputError("directory", str(path), "a folder that does not exist yet")
    return path


def moved(run: Run, directory: str) -> Run:
    """The run in another directory, whose training starts from the checkpoint there.

    It has no mirror: that of the run would bring back the run's own steps, and lose them.
    """
    checkpoint = dataclasses.replace(run.checkpoint, directory="checkpoints", mirror=None)
    source = str(Path(directory) / checkpoint.directory)
    train = dataclasses.replace(run.train, init_from=source, init_changes=None)
    return dataclasses.replace(run, directory=directory, checkpoint=checkpoint, train=train)


def write_directory(
    run: Run,
    path: Path,
    params: Params,
    tokenizer: Tokenizer,
) -> None:
    """Writes a run's configuration, and a checkpoint of step 0 that has the parameters alone."""
    position = {"depends_on": {"tokenizer": tokenizer.fingerprint}}
    facts = checkpoint_facts(run.model)
    with contextlib.closing(Checkpoints(run.checkpoint.within(path), **facts)) as checkpoints:
        checkpoints.save(0, {"params": params}, position, force=True)
    # Last, so that a directory with it is whole.
    (path / CONFIG).write_text(gin_text(run))
    logger.info("wrote a run's directory: %s", path)


def gin_text(run: Run) -> str:
    """The gin file that binds a run; its parts are in no scope, so that another file binds more."""
    values, fields = {}, {}
    for field in dataclasses.fields(run):
        value = getattr(run, field.name)
        is_part = dataclasses.is_dataclass(value) or isinstance(value, functools.partial)
        scopes = () if is_part else (field.name,)
        values[field.name], more = as_written(value, scopes)
        fields |= more
    for index, source in enumerate(run.data.sources):
        fields.pop(((f"sources_{index}",), type(source)), None)
    sources = [as_written(source, ()) for source in run.data.sources]
    fields[(), DataConfig]["sources"] = tuple(reference for reference, _ in sources)
    for _, more in sources:
        fields |= more
    return render({((), Run): values} | fields)
