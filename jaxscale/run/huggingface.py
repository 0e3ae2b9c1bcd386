"""`import` and `export`: folders of Hugging Face to run directories of ours, and back."""

import contextlib
import dataclasses
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  numpy knows "bfloat16" by it
import numpy as np

from jaxscale.convert.folder import (
    CONFIG,
    MAX_SHARD_BYTES,
    family_of,
    open_folder,
    write_folder,
)
from jaxscale.convert.peft import write_adapters
from jaxscale.convert.tokenizer import GENERATION_CONFIG, TOKENIZER_CONFIG, tokenizer_config
from jaxscale.data.tokenizer import (
    HUGGING_FACE_FILE,
    SENTENCE_PIECE_FILE,
    check_vocabulary,
    load_tokenizer,
)
from jaxscale.models.config import ModelConfig
from jaxscale.models.lora import merged, without_adapters
from jaxscale.models.parameters import parameter_table
from jaxscale.models.quantised import QuantisedConfig, quantised
from jaxscale.parallel.mesh import MeshConfig, make_mesh
from jaxscale.parallel.rules import make_specs
from jaxscale.run.directory import gin_text, new_path, write_directory
from jaxscale.run.folder import KEPT, folder_run, is_folder, run_of
from jaxscale.run.model import restore_model
from jaxscale.run.run import Run
from jaxscale.train.run_directory import CONFIG as RUN_CONFIG
from jaxscale.train.state import stored_params
from jaxscale.types import InputError

logger = logging.getLogger(__name__)

FILES = (
    CONFIG,
    GENERATION_CONFIG,
    HUGGING_FACE_FILE,
    SENTENCE_PIECE_FILE,
    TOKENIZER_CONFIG,
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "vocab.json",
)


def import_model(
    *,
    source: str,
    directory: str | None = None,
    mesh: MeshConfig = MeshConfig(),
) -> Run:
    """Makes a run directory of a folder of Hugging Face, for `load`, `generate` and fine-tuning.

    Args:
        source: the folder, with config.json, safetensors and a tokenizer.
        directory: of the new run: configuration, checkpoint of step 0 and tokenizer. The
            checkpoint's parameters have the weights' type. None for runs/NAME of the folder's name.
        mesh: over whose devices the weights are spread as they are read, such as data 8 with zero 3
            for a model that does not fit one device. The checkpoint is of no mesh.
    Returns:
        The run. `pretrain` with another directory starts from its weights.
    Raises:
        InputError: the folder has something missing, unknown or contradictory, which is named,
            `directory` exists, or the mesh has a pipeline, whose layers are in another order.
    """
    if mesh.pipeline > 1:
        raise InputError("mesh.pipeline", mesh.pipeline, "1 for an import")
    folder = open_folder(source)
    directory = directory or f"runs/{folder.path.resolve().name}"
    path = new_path(directory)
    tokenizer = tokenizer_config(folder.path)
    tokenizer_there = dataclasses.replace(tokenizer, path=str(Path(directory) / KEPT))
    run = run_of(folder, directory, tokenizer_there)
    loaded = load_tokenizer(tokenizer)
    check_vocabulary(loaded, run.model.vocab_size)
    devices = make_mesh(mesh, jax.devices()[: math.prod(mesh.sizes)])
    specs = make_specs(run.table(), mesh)
    stored = stored_params(run.table(), devices, specs, run.policy.parameters)
    params = folder.params(stored)
    _keep_files(folder.path, path / KEPT)
    write_directory(run, path, params, loaded)
    logger.info("imported %s (%s) to %s", folder.path, folder.values["model_type"], path)
    return run


def export_model(
    *,
    run: Run,
    directory: str,
    step: int | None = None,
    family: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    is_peft: bool = False,
    quantisation: QuantisedConfig | None = None,
) -> None:
    """Writes a checkpoint as a folder that Hugging Face loads, with its tokenizer.

    Low-rank adapters are merged into their matrices.

    Args:
        run: the run.
        directory: the new folder.
        step: which checkpoint; the newest when None.
        family: `model_type` to write; None for that of the import, or else the first that has all
            that the model has.
        dtype: of the weights; None for that of the run's parameters.
        max_shard_bytes: largest file of weights.
        is_peft: writes the adapters alone, as a folder of PEFT.
        quantisation: writes matrices in few bits, as "pack-quantized" of compressed-tensors; None
            writes them whole.
    Raises:
        InputError: no such checkpoint, no family has all that the model has, or the folder has a
            model already.
    """
    params = restore_model(run, step=step).params
    kept = files_beside(run)
    if is_peft:
        layout = family_of(without_adapters(run.model), kept).layout
        write_adapters(directory, run.model, layout, params)
        return
    params, model = merged(params, run.model.lora), without_adapters(run.model)
    dtype = dtype or run.policy.parameters
    if quantisation is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)  # and so the scales
        params = quantised(params, parameter_table(model), quantisation)
    path = Path(directory).expanduser()
    write_folder(
        path,
        model,
        params,
        dtype=np.dtype(dtype),
        family=family,
        like=kept / CONFIG,
        max_shard_bytes=max_shard_bytes,
    )
    _keep_files(kept, path)
    if not any((path / name).exists() for name in (HUGGING_FACE_FILE, SENTENCE_PIECE_FILE)):
        load_tokenizer(run.data.tokenizer).save(path)


def huggingface_model(*, directory: str) -> ModelConfig:
    """The model of a folder of Hugging Face, for a gin file to name: `@run.huggingface_model()`.

    Args:
        directory: the folder, with config.json and safetensors; the weights are not read.
    Raises:
        InputError: the folder is missing, or its config.json cannot be read; names the field.
    """
    return open_folder(directory).config


def files_beside(run: Run) -> Path:
    """The folder of a run's tokenizer, where an import keeps what stood beside the weights."""
    return Path(run.data.tokenizer.path or run.path).expanduser()


@contextlib.contextmanager
def configuration_of(directory: Path) -> Iterator[Path]:
    """The gin file of a run's directory; of a folder of Hugging Face one for the time being."""
    if not is_folder(directory):
        yield directory / RUN_CONFIG
        return
    with tempfile.TemporaryDirectory() as there:
        file = Path(there) / RUN_CONFIG
        file.write_text(gin_text(folder_run(directory)))
        yield file


def _keep_files(source: Path, target: Path) -> None:
    """Copies what stands beside the weights; a config.json that is there stays."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
