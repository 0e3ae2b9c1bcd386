"""Arrays of any source as a checkpoint of another system."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from jaxscale.checkpoint.deepspeed_writer import tag_of, write_universal
from jaxscale.checkpoint.rank_files import ONLY_RANK, write_npz
from jaxscale.checkpoint.safetensors import CODES, NewTensor, write_safetensors
from jaxscale.checkpoint.source import LazyArray
from jaxscale.types import InputError

Kind = Literal["deepspeed", "safetensors", "npz"]
KINDS = ("deepspeed", "safetensors", "npz")
MAX_SHARD_BYTES = 5_000_000_000
# Of a piece there are at once what is read, its copies on the way, and its bytes as written.
MAX_COPIES = 8


def export(
    leaves: Mapping[str, LazyArray],
    directory: Path,
    *,
    kind: Kind,
    step: int,
    budget_bytes: int,
    learning_rate: float | None = None,
) -> None:
    """Writes arrays in pieces; of safetensors one whole tensor is in memory.

    Args:
        leaves: arrays by name; "deepspeed" takes parameters and Adam moments of them.
        directory: of the new checkpoint; made if need be.
        kind: "deepspeed", a universal folder; "safetensors"; "npz", one uncompressed file.
        step: finished steps, of which DeepSpeed's form keeps the number.
        budget_bytes: of host memory.
        learning_rate: of the next step, which DeepSpeed's form keeps where it is given.
    Raises:
        InputError: there is such a checkpoint, of which only safetensors are replaced, or an array
            cannot be part of one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    piece_bytes = max(1, budget_bytes // MAX_COPIES)
    if kind == "deepspeed":
        write_universal(
            leaves,
            directory,
            step=step,
            piece_bytes=piece_bytes,
            learning_rate=learning_rate,
        )
    elif kind == "safetensors":
        tensors = [_new_tensor(name, array) for name, array in leaves.items()]
        write_safetensors(directory, tensors, max_shard_bytes=MAX_SHARD_BYTES)
    else:
        write_npz(leaves, directory / f"{ONLY_RANK}.npz", piece_bytes=piece_bytes)


def is_exported(directory: Path, *, kind: Kind, step: int) -> bool:
    """Whether `export` has written a step there; other kinds than "deepspeed" name no step."""
    return kind == "deepspeed" and (directory / tag_of(step)).exists()


def _new_tensor(name: str, array: LazyArray) -> NewTensor:
    if array.dtype not in CODES:
        expected = f"a type of safetensors: {', '.join(CODES.values())}"
        raise InputError(name, str(array.dtype), expected)
    return NewTensor(name, tuple(array.shape), array.dtype, lambda: array[()])
