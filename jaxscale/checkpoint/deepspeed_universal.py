"""A universal folder of DeepSpeed as it is read: each state of a parameter is a file."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from jaxscale.checkpoint.file_array import FileArray
from jaxscale.checkpoint.source import LazyArray
from jaxscale.checkpoint.torch_file import Tensor, load_torch
from jaxscale.types import InputError

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
UNIVERSAL = "zero"
WEIGHTS = "fp32"
VOCABULARY = "vocab_tensor"  # without the rows that tensor ranks were padded with
STEP = "step"  # of the optimizer, a number


def universal_leaves(folder: Path) -> dict[str, LazyArray]:
    """Each state of each parameter by its path, "fp32/NAME" and so on; nothing is read.

    Args:
        folder: of the parameters, beside the model files.
    Raises:
        InputError: a file is missing or damaged.
    """
    shapes = _shapes(folder.parent)
    leaves = {}
    for path in sorted(folder.glob("*/*.pt")):
        if path.stem == STEP:
            continue
        content = load_torch(path)
        array = content.get("param") if isinstance(content, dict) else content
        if not isinstance(array, Tensor):
            raise InputError("checkpoint", str(path), "a file with a tensor")
        name = path.parent.name
        is_cut = isinstance(content, dict) and content.get(VOCABULARY, False)
        wanted = array.shape if is_cut else shapes.get(name, array.shape)
        leaves[f"{path.stem}/{name}"] = _in_shape(array, wanted, path)
    _check_complete(folder, leaves)
    return leaves


def _in_shape(array: Tensor, shape: tuple[int, ...], path: Path) -> LazyArray:
    """A parameter in its shape; made of ZeRO 3 it is flat, with padding at its end."""
    if array.shape == shape:
        return array
    is_flat = isinstance(array, FileArray) and len(array.shape) == 1
    if not is_flat or array.shape[0] < math.prod(shape):
        raise InputError(str(path), array.shape, f"a tensor of shape {shape}")
    return array.part(0, shape)


def _check_complete(folder: Path, leaves: Mapping[str, LazyArray]) -> None:
    """Raises InputError unless each parameter that model files name is there, with all states."""
    having: dict[str, set[str]] = {}
    for path in leaves:
        state, _, name = path.partition("/")
        having.setdefault(name, set()).add(state)
    states = {WEIGHTS}.union(*having.values())
    for model in _models(folder.parent):
        for group in load_torch(model).get("param_shapes") or ():
            for name in group:
                having.setdefault(name, set())
    for name, own in having.items():
        missing = sorted(states - own)
        if missing:
            expected = f"a file {name}/{missing[0]}.pt, as other parameters have"
            raise InputError("checkpoint", str(folder), expected)


def _models(folder: Path) -> list[Path]:
    paths = folder.glob("*_model_states.pt")
    return sorted(path for path in paths if MODEL_FILE.fullmatch(path.name))


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters that the model files of one tensor rank name."""
    models = _models(folder)
    ranks = {MODEL_FILE.fullmatch(path.name)[2] for path in models}
    if len(ranks) != 1:
        return {}  # those of several ranks are shapes of parts
    groups = load_torch(models[0]).get("param_shapes") or ()
    return {name: shape for group in groups for name, shape in group.items()}
