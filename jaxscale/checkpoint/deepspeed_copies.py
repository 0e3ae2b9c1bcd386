"""DeepSpeed's files of one layer of a pipeline module, and of one expert of a mixture.

They hold weights in the training's type. Most are copies of what the optimizers' files have in
float32; those that no optimizer has, as they are frozen or no parameters, are nowhere else.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxscale.checkpoint.boxes import boxes, piece_sizes
from jaxscale.checkpoint.torch_file import Tensor, load_torch
from jaxscale.checkpoint.universal import Shard
from jaxscale.types import InputError

logger = logging.getLogger(__name__)

EXPERT_FILE = re.compile(
    r"layer_(?P<layer>\d+)_expert_(?P<expert>\d+)_mp_rank_(?P<tensor>\d+)_model_states\.pt"
)
LAYER_FILE = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
LAYER_OF = re.compile(r"(\d+)\.")
EXPERT_OF = re.compile(r"\bdeepspeed_experts\.(\d+)\.")
TIED = "tied_modules."
WEIGHTS = "fp32"
PIECE_BYTES = 1 << 26


def is_copy(path: Path) -> bool:
    """Whether a file is one of these."""
    return any(pattern.fullmatch(path.name) for pattern in (EXPERT_FILE, LAYER_FILE))


def untrained(folder: Path, weights: Sequence[Shard]) -> Iterator[Shard]:
    """The weights in these files that are no copies.

    Args:
        folder: of the checkpoint.
        weights: all that its other files hold.
    Raises:
        InputError: a file of a layer or an expert is missing.
    """
    names = {shard.name for shard in weights}
    files = sorted(filter(is_copy, folder.glob("layer_*.pt")))
    _check_files(folder, [path.name for path in files], names)
    tied = [shard for shard in weights if shard.name.startswith(TIED)]
    for path in files:
        layer = LAYER_FILE.fullmatch(path.name)
        prefix = f"{int(layer[1])}." if layer else ""
        number = layer[2] if layer else EXPERT_FILE.fullmatch(path.name)["tensor"]
        # It does not name its stage.
        ranks = {"tensor": int(number or 0), "pipeline": 0}
        for key, array in load_torch(path).items():
            if prefix + key in names or not isinstance(array, Tensor):
                continue
            shard = Shard(prefix + key, ranks, array, WEIGHTS)
            if not any(_is_copied(key, shard, other) for other in tied):
                yield shard


def _check_files(folder: Path, files: Sequence[str], names: Iterable[str]) -> None:
    """Raises InputError unless each layer and each expert that is trained has its file.

    DeepSpeed writes no file of a layer that is a plain function, and nothing else names a layer
    that is frozen as a whole. So a number without a file is logged, not refused.
    """
    layers, experts = _numbers(files)
    if absent := sorted(set(range(max(layers, default=0))) - layers):
        message = "%s has no files of the pipeline's layers %s: they are functions, or lost"
        logger.warning(message, folder, absent)
    for name in names:
        layer = LAYER_OF.match(name)
        if layers and layer and int(layer[1]) not in layers:
            _miss(folder, f"layer {layer[1]}", name)
        expert = EXPERT_OF.search(name)
        if expert is None:
            continue
        for number, held in experts.items():
            if int(expert[1]) not in held:
                _miss(folder, f"expert {expert[1]} of layer {number}", name)


def _numbers(files: Sequence[str]) -> tuple[set[int], dict[str, set[int]]]:
    """The layers that have files, and the experts of each layer that do."""
    layers = set()
    experts: dict[str, set[int]] = {}
    for file in files:
        layer = LAYER_FILE.fullmatch(file)
        if layer:
            layers.add(int(layer[1]))
        expert = EXPERT_FILE.fullmatch(file)
        if expert:
            held = experts.setdefault(expert["layer"], set())
            held.add(int(expert["expert"]))
    return layers, experts


def _miss(folder: Path, what: str, name: str) -> None:
    expected = f"a file of {what}, as there is {name}"
    raise InputError("checkpoint", str(folder), expected)


def _is_copied(key: str, shard: Shard, tied: Shard) -> bool:
    """Whether a layer's weight is that of a tied module, whose name its file does not have."""
    array = shard.array
    is_like = tied.name.endswith(f".{key}") and tied.array.shape == array.shape
    if not is_like or tied.ranks["tensor"] != shard.ranks["tensor"]:
        return False
    for box in boxes(array.shape, piece_sizes(array, PIECE_BYTES)):
        rounded = tied.array[box].astype(array.dtype)
        if not np.array_equal(rounded, array[box]):
            return False
    return True
