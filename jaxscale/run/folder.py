"""A folder of Hugging Face as a run, whose weights lie there."""

from pathlib import Path

from jaxscale.checkpoint.manager import CheckpointConfig
from jaxscale.convert.folder import CONFIG, Folder, open_folder
from jaxscale.convert.tokenizer import tokenizer_config
from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import StandardLibrary
from jaxscale.data.tokenizer import TokenizerConfig
from jaxscale.ops.precision import FLOAT_TYPES, Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.run.run import Run
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.run_directory import CONFIG as RUN_CONFIG
from jaxscale.types import InputError

KEPT = "huggingface"  # folder of a run with the files beside the weights
CHECKPOINTS = "checkpoints"


def is_folder(directory: Path) -> bool:
    """Whether a directory is one of Hugging Face, and no run's."""
    return (directory / CONFIG).is_file() and not (directory / RUN_CONFIG).exists()


def folder_run(directory: Path) -> Run:
    """A folder of Hugging Face as a run that is there to be used, not to be trained.

    Raises:
        InputError: as `open_folder`, or the tokenizer is missing.
    """
    folder = open_folder(directory)
    return run_of(folder, str(directory), tokenizer_config(folder.path))


def run_of(folder: Folder, directory: str, tokenizer: TokenizerConfig) -> Run:
    """A run of a folder's model; what is of the training waits to be said by another file."""
    dtype = str(folder.dtype)
    if dtype not in FLOAT_TYPES:
        raise InputError(f"{folder.path}: dtype", dtype, f"weights of {', '.join(FLOAT_TYPES)}")
    return Run(
        directory=directory,
        model=folder.config,
        mesh=MeshConfig(),
        data=DataConfig(
            sources=(StandardLibrary(),),
            sequence_length=folder.config.max_length,
            batch_size=1,
            tokenizer=tokenizer,
        ),
        optimizer=OptimizerConfig(),
        train=TrainConfig(steps=1, init_from=str(Path(directory) / CHECKPOINTS)),
        checkpoint=CheckpointConfig(CHECKPOINTS, save_every=1, keep_last=1, is_async=False),
        policy=Policy(parameters=dtype, compute=dtype),
    )
