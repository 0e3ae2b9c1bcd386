"""`adapt`: a run of a trained model with new low-rank adapters, which alone are trained."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxscale.convert.folder import family_of
from jaxscale.convert.peft import read_adapters
from jaxscale.data.tokenizer import load_tokenizer
from jaxscale.models.config import LoraConfig
from jaxscale.models.lora import TRAINABLE, new_adapters, with_adapters
from jaxscale.ops.precision import cast
from jaxscale.run.directory import moved, new_path, write_directory
from jaxscale.run.huggingface import files_beside
from jaxscale.run.model import restore_model
from jaxscale.run.run import Run
from jaxscale.types import InputError

PARAMETERS = "float32"  # an update of an adapter is too small for bfloat16


def adapt(
    *,
    run: Run,
    directory: str,
    lora: LoraConfig | None = None,
    adapters: str | None = None,
    step: int | None = None,
    seed: int = 0,
) -> Run:
    """Writes a run directory from whose parameters a training of adapters starts.

    Args:
        run: of the trained model, which has no adapters.
        directory: of the new run. `pretrain` with another directory trains its adapters.
        lora: of new adapters; or
        adapters: a folder of PEFT with trained ones.
        step: which checkpoint of `run`; the newest when None.
        seed: of the adapters' first values.
    Returns:
        The new run; its parameters are float32.
    Raises:
        InputError: both or none of `lora` and `adapters` are given, the model has adapters already,
            those of the folder do not fit it, there is no such checkpoint, or `directory`
            exists.
    """
    path = new_path(directory)
    if run.model.lora is not None:
        raise InputError("ModelConfig.lora", run.model.lora, "None: `export` merges adapters")
    if (lora is None) == (adapters is None):
        raise InputError("adapters", adapters, "a folder of PEFT, or else lora.rank of new ones")
    params = cast(restore_model(run, step=step).params, PARAMETERS)
    if adapters is None:
        adapted = adapted_run(run, directory, lora)
        leaves = new_adapters(adapted.model, jax.random.key(seed), PARAMETERS)
    else:
        family = family_of(run.model, files_beside(run))
        found = read_adapters(adapters, run.model, family.layout)
        adapted = adapted_run(run, directory, found.lora)
        leaves = jax.tree.map(jnp.asarray, found.leaves)
    params = with_adapters(params, adapted.model, leaves)
    write_directory(adapted, path, params, load_tokenizer(run.data.tokenizer))
    return adapted


def adapted_run(run: Run, directory: str, lora: LoraConfig) -> Run:
    """The run of `adapt`, whose training starts from its own checkpoint."""
    run = moved(run, directory)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, lora=lora),
        train=dataclasses.replace(run.train, trainable=TRAINABLE),
        policy=dataclasses.replace(run.policy, parameters=PARAMETERS),
    )
