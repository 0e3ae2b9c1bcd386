"""`average`: a run of the running average of a trained model's parameters."""

from jaxscale.data.tokenizer import load_tokenizer
from jaxscale.run.directory import moved, new_path, write_directory
from jaxscale.run.folder import is_folder
from jaxscale.run.model import restore_model
from jaxscale.run.run import Run
from jaxscale.types import InputError


def average(*, run: Run, directory: str, step: int | None = None) -> Run:
    """Writes a run directory whose model is the average that `train.average` kept.

    Args:
        run: of a training with `OptimizerConfig.average_decay`.
        directory: of the new run. What was frozen is as it was; a critic is left out.
        step: which checkpoint of `run`; the newest when None.
    Returns:
        The new run; `pretrain` with another directory starts from its parameters.
    Raises:
        InputError: there is no such checkpoint, it has no averages, no update has been made since
            they began, or `directory` exists.
    """
    path = new_path(directory)
    if is_folder(run.path):
        raise InputError("run", str(run.path), "a run that was trained, not a folder of weights")
    params = restore_model(run, step=step, is_averaged=True).params
    averaged = moved(run, directory)
    write_directory(averaged, path, params, load_tokenizer(run.data.tokenizer))
    return averaged
