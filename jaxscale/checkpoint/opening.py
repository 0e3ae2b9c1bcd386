"""A path to a checkpoint of any system: what it is, and the source that reads it."""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

from jaxscale.checkpoint import (
    deepspeed,
    manifest,
    megatron,
    megatron_buckets,
    native,
    rank_files,
    steps,
    torch_distributed,
)
from jaxscale.checkpoint.boxes import Merged
from jaxscale.checkpoint.patterns import Rule
from jaxscale.checkpoint.remote import RemotePath
from jaxscale.checkpoint.safetensors import INDEX, SINGLE, SafetensorsSource
from jaxscale.checkpoint.source import Source
from jaxscale.checkpoint.universal import Shard, merge
from jaxscale.checkpoint.zipped import check_archive
from jaxscale.types import InputError

RANK_FILES, DEEPSPEED, MEGATRON = "per-rank npz", "DeepSpeed", "Megatron-LM"
DISTRIBUTED, MEGATRON_DISTRIBUTED = "PyTorch distributed", "Megatron-LM distributed"
OF_RANKS = (RANK_FILES, DEEPSPEED, MEGATRON)  # take rules themselves
OF_CHUNKS = (DISTRIBUTED, MEGATRON_DISTRIBUTED)
ARCHIVES = (".npz", ".pt")  # the files of their ranks


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint on disk.

    Args:
        kind: which system's, in words.
        path: the folder that holds it.
        source: reads it.
    """

    kind: str
    path: Path | RemotePath
    source: Source

    def check(self) -> None:
        """Compares checksums: all systems have them but safetensors.

        Without, a lost chunk of ours would be read as zeros, and a flipped bit as another number.

        Raises:
            InputError: it is damaged; names the file.
        """
        if isinstance(self.source, native.NativeCheckpoint):
            damage = manifest.find_damage(self.path, lambda name: True)
            if damage is not None:
                raise InputError("checkpoint", str(self.path), f"a sound checkpoint; {damage}")
        with concurrent.futures.ThreadPoolExecutor(manifest.MAX_THREADS) as pool:
            list(pool.map(lambda place: check_archive(*place), self._archives()))

    def _archives(self) -> list[tuple[Path, int, int | None]]:
        """Where the zip archives of another system are: file, first byte and size."""
        if self.kind in OF_RANKS:
            files = [path for path in self.path.rglob("*") if path.suffix in ARCHIVES]
            return [(path, 0, None) for path in sorted(files)]
        if self.kind in OF_CHUNKS:
            return torch_distributed.DistributedCheckpoint(self.path).archives()
        return []

    def identity(self) -> str:
        """Changes when a file of the checkpoint does."""
        digest = hashlib.sha256()
        if isinstance(self.path, RemotePath):
            digest.update((self.path / manifest.MANIFEST).read_text().encode())
            return digest.hexdigest()
        for path in sorted(self.path.rglob("*")):
            if path.is_file():
                facts = path.stat()
                name = path.relative_to(self.path)
                digest.update(f"{name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Ruled:
    """Whole arrays under the names that rules give them; a `Source`."""

    source: Source
    rules: tuple[Rule, ...]

    def leaves(self) -> Mapping[str, Merged]:
        shards = [Shard(name, {}, array) for name, array in self.source.leaves().items()]
        return merge(shards, self.rules)


def place_of(path: str) -> Path | RemotePath:
    """Where a path of the command line leads: into an object store, or on this machine."""
    return RemotePath.of(path) if "://" in path else Path(path).expanduser()


def steps_in(path: Path | RemotePath) -> list[int]:
    """The committed steps in a folder, in ascending order."""
    if isinstance(path, RemotePath):
        return path.committed_steps()
    return steps.committed_steps(path)


def open_checkpoint(
    path: Path | RemotePath,
    rules: tuple[Rule, ...] | None = None,
) -> Opened:
    """Opens the checkpoint at a path; of a run's folder the newest step.

    Args:
        path: of a step, of a folder of steps, or of another system's folder on this machine.
        rules: how the tensors of its ranks, or its whole arrays, make up parameters; its own or its
            system's when None.
    Raises:
        InputError: there is none, or its list of arrays is damaged.
    """
    opened = _open_remote(path) if isinstance(path, RemotePath) else _open_local(path, rules)
    if rules is None or opened.kind in OF_RANKS:
        return opened
    if isinstance(opened.source, native.NativeCheckpoint):
        expected = "a checkpoint of another system; one of jaxscale has its own names"
        raise InputError("rules", str(opened.path), expected)
    return dataclasses.replace(opened, source=_Ruled(opened.source, rules))


def _open_remote(path: RemotePath) -> Opened:
    numbers = path.committed_steps()
    if numbers:
        path = path / str(numbers[-1])
    if not path.is_committed():
        expected = "a step of jaxscale that is whole, or a folder of steps"
        raise InputError("checkpoint", str(path), expected)
    return Opened("jaxscale", path, native.NativeCheckpoint(path))


def _open_local(path: Path, rules: tuple[Rule, ...] | None) -> Opened:
    if not path.exists():
        raise InputError("checkpoint", str(path), "a checkpoint's folder; there is nothing")
    numbers = steps.committed_steps(path)
    if numbers and not deepspeed.names_latest(path):
        path = path / str(numbers[-1])
    path = megatron.latest_iteration(path)
    if native.is_native(path):
        return Opened("jaxscale", path, native.NativeCheckpoint(path))
    if rank_files.is_rank_folder(path):
        return Opened(RANK_FILES, path, rank_files.RankFiles(path, rules))
    # Trainers write safetensors of the weights beside DeepSpeed's own files, which have it all.
    tag = deepspeed.find_tag(path)
    if tag is not None:
        return Opened(DEEPSPEED, tag, deepspeed.DeepSpeedCheckpoint(tag, rules))
    if (path / INDEX).is_file() or (path / SINGLE).is_file():
        return Opened("safetensors", path, SafetensorsSource(path))
    if megatron.is_megatron(path):
        return Opened(MEGATRON, path, megatron.MegatronCheckpoint(path, rules))
    if torch_distributed.is_distributed(path):
        if megatron_buckets.is_megatron_distributed(path):
            source = megatron_buckets.MegatronDistributedCheckpoint(path)
            return Opened(MEGATRON_DISTRIBUTED, path, source)
        source = torch_distributed.DistributedCheckpoint(path)
        return Opened(DISTRIBUTED, path, source)
    expected = (
        "a step of jaxscale, a folder of steps, or a folder of a system in docs/checkpoints.md"
    )
    raise InputError("checkpoint", str(path), expected)
