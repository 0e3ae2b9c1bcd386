"""A path to a checkpoint of any system: what it is, and the source that reads it."""

import dataclasses
import hashlib
from pathlib import Path

from jaxscale.checkpoint import (
    deepspeed,
    megatron,
    native,
    rank_files,
    steps,
    torch_distributed,
)
from jaxscale.checkpoint.patterns import Rule
from jaxscale.checkpoint.source import Source
from jaxscale.types import InputError


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint on disk.

    Args:
        kind: which system's, in words.
        path: the folder that holds it.
        source: reads it.
    """

    kind: str
    path: Path
    source: Source

    def identity(self) -> str:
        """Changes when a file of the checkpoint does."""
        digest = hashlib.sha256()
        for path in sorted(self.path.rglob("*")):
            if path.is_file():
                facts = path.stat()
                name = path.relative_to(self.path)
                digest.update(f"{name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def open_checkpoint(path: Path, rules: tuple[Rule, ...] | None = None) -> Opened:
    """Opens the checkpoint at a path; of a run's folder the newest step.

    Args:
        path: of a step, of a folder of steps, or of another system's folder.
        rules: how the tensors of its ranks make up parameters; its own or its system's when None.
    Raises:
        InputError: there is none, or its list of arrays is damaged.
    """
    if not path.exists():
        raise InputError("checkpoint", str(path), "a checkpoint's folder; there is nothing")
    numbers = steps.committed_steps(path)
    if numbers:
        path = path / str(numbers[-1])
    if native.is_native(path):
        return Opened("jaxscale", path, native.NativeCheckpoint(path))
    if rank_files.is_rank_folder(path):
        return Opened("per-rank npz", path, rank_files.RankFiles(path, rules))
    tag = deepspeed.find_tag(path)
    if tag is not None:
        return Opened("DeepSpeed", tag, deepspeed.DeepSpeedCheckpoint(tag, rules))
    iteration = megatron.find_iteration(path)
    if iteration is not None:
        return Opened("Megatron-LM", iteration, megatron.MegatronCheckpoint(iteration, rules))
    if torch_distributed.is_distributed(path):
        source = torch_distributed.DistributedCheckpoint(path)
        return Opened("PyTorch distributed", path, source)
    expected = (
        "a step of jaxscale, a folder of steps, or a folder of a system in docs/checkpoints.md"
    )
    raise InputError("checkpoint", str(path), expected)
