"""A universal folder of DeepSpeed, which it loads under any ZeRO stage and number of ranks.

Each parameter has a folder with a file of its weights and one of each Adam moment.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxscale.checkpoint.file_array import is_plain_name
from jaxscale.checkpoint.source import LazyArray
from jaxscale.checkpoint.torch_writer import save_torch
from jaxscale.types import InputError

WEIGHTS, STATES = "fp32", ("fp32", "exp_avg", "exp_avg_sq")
STATE_OF_MOMENT = {"mu": "exp_avg", "nu": "exp_avg_sq"}  # as optax calls them
LATEST, UNFINISHED = "latest_universal", ".part"
# What the file format is like, not who wrote it: DeepSpeed refuses a file that names no version.
VERSION = "0.19.8"
# DeepSpeed reads as many groups of parameters as both it and the file have; what is in a group of
# the file replaces what the program has set, so each has a learning rate at most.
MAX_GROUPS = 64
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def write_universal(
    leaves: Mapping[str, LazyArray],
    folder: Path,
    *,
    step: int,
    piece_bytes: int,
    learning_rate: float | None = None,
) -> None:
    """Writes parameters, and Adam's moments where there are any, for DeepSpeed's `load_universal`.

    Args:
        leaves: "fp32/NAME", "exp_avg/NAME" and "exp_avg_sq/NAME" as of a DeepSpeed checkpoint, or
            the state of a run, whose names become "layers.0.attention.q" and so on.
        folder: new; it gets a folder of the step and the file `latest_universal`.
        step: finished steps.
        piece_bytes: of an array in memory at once.
        learning_rate: of the next step; None leaves what the program begins with.
    Raises:
        InputError: `folder` has such a checkpoint, or the leaves are no parameters and moments.
    """
    states = adam_states(leaves)
    if step < 1 and any(state != WEIGHTS for state, _ in states):
        raise InputError("step", step, "finished steps of at least 1, as there are moments")
    tag = tag_of(step)
    if (folder / tag).exists():
        raise InputError("destination", str(folder / tag), "a folder that does not exist yet")
    unfinished = folder / f"{tag}{UNFINISHED}"
    shutil.rmtree(unfinished, ignore_errors=True)
    root = unfinished / "zero"
    names = [name for state, name in states if state == WEIGHTS]
    for name in names:
        if not is_plain_name(name):
            raise InputError("checkpoint", name, "names of parameters that can be a folder's")
    for (state, name), array in states.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        content = {"param": array, "cat_dim": 0}
        save_torch(root / name / f"{state}.pt", content, piece_bytes=piece_bytes)
    for name in names:
        save_torch(root / name / "step.pt", _step(step), piece_bytes=piece_bytes)
    group = {} if learning_rate is None else {"lr": learning_rate}
    inner = {"state": {0: {"step": _step(step)}}, "param_groups": [group]}
    optimizer = {
        "ds_version": VERSION,
        "param_groups": [group for _ in range(MAX_GROUPS)],
        "optimizer_state_dict": inner,
    }
    save_torch(root / "optimizer_state.pt", optimizer, piece_bytes=piece_bytes)
    model = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [{name: states[WEIGHTS, name].shape for name in names}],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
    for name in MODEL_FILES:
        save_torch(unfinished / name, model, piece_bytes=piece_bytes)
    unfinished.rename(folder / tag)
    (folder / LATEST).write_text(tag)


def tag_of(step: int) -> str:
    """The name of a step's folder; trainers look for "global_step*"."""
    return f"global_step{step}_universal"


def adam_states(leaves: Mapping[str, LazyArray]) -> dict[tuple[str, str], LazyArray]:
    """(state, name) -> array: the weights and Adam moments among the leaves.

    Raises:
        InputError: there are no weights, or some parameter has no moments while others have.
    """
    states: dict[tuple[str, str], LazyArray] = {}
    for path, array in leaves.items():
        place = _place_of(path)
        if place is None:
            continue
        if place in states:
            raise InputError("checkpoint", path, f"one array that becomes {'/'.join(place)}")
        states[place] = array
    names = {name for state, name in states if state == WEIGHTS}
    if not names:
        raise InputError("checkpoint", sorted(leaves)[:3], "leaves under params/ or fp32/")
    for state in STATE_OF_MOMENT.values():
        having = {name for kind, name in states if kind == state}
        if having and having != names:
            differing = sorted(having ^ names)[0]
            raise InputError("checkpoint", differing, f"{state} of every parameter, or of none")
    kinds = {state for state, _ in states} - {WEIGHTS}
    if kinds and kinds != set(STATE_OF_MOMENT.values()):
        raise InputError("checkpoint", sorted(kinds), "both moments of Adam, or none")
    return states


def _place_of(path: str) -> tuple[str, str] | None:
    """The state and the name that a leaf becomes; None where it is neither weight nor moment."""
    first, _, name = path.partition("/")
    if first in STATES:
        return first, name
    if first == "params":
        return WEIGHTS, name.replace("/", ".")
    words = name.split("/")
    for moment, state in STATE_OF_MOMENT.items():
        if first == "opt_state" and moment in words:
            return state, ".".join(words[words.index(moment) + 1 :])
    return None


def _step(step: int) -> np.ndarray:
    return np.array(step, np.float32)
