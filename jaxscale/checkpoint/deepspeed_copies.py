"""DeepSpeed's files of one layer of a pipeline module, and of one expert of a mixture.

They hold weights in the training's type. Most are copies of what the optimizers' files have in
float32; those that no optimizer has, as they are frozen or no parameters, are nowhere else.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxscale.checkpoint.boxes import boxes, piece_sizes
from jaxscale.checkpoint.torch_file import Tensor, load_torch
from jaxscale.checkpoint.universal import Shard

EXPERT_FILE = re.compile(r"layer_\d+_expert_\d+_mp_rank_(\d+)_model_states\.pt")
LAYER_FILE = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
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
    """
    names = {shard.name for shard in weights}
    tied = [shard for shard in weights if shard.name.startswith(TIED)]
    for path in sorted(filter(is_copy, folder.glob("layer_*.pt"))):
        layer = LAYER_FILE.fullmatch(path.name)
        prefix = f"{int(layer[1])}." if layer else ""
        number = layer[2] if layer else EXPERT_FILE.fullmatch(path.name)[1]
        # It does not name its stage.
        ranks = {"tensor": int(number or 0), "pipeline": 0}
        for key, array in load_torch(path).items():
            if prefix + key in names or not isinstance(array, Tensor):
                continue
            shard = Shard(prefix + key, ranks, array, WEIGHTS)
            if not any(_is_copied(key, shard, other) for other in tied):
                yield shard


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
