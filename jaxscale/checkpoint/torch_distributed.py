"""Distributed checkpoints of PyTorch (DCP): `.metadata` and the ranks' `*.distcp` files.

Their metadata already is geometry: each tensor's size, and offsets and sizes of the chunks that
ranks have saved, whatever mesh, FSDP2 or tensor parallelism they came from.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxscale.checkpoint.boxes import Merged, Placement
from jaxscale.checkpoint.pickled import Named, read_pickle
from jaxscale.checkpoint.source import contents_named
from jaxscale.checkpoint.torch_file import BUILDERS, Tensor, load_torch, torch_dtype
from jaxscale.types import InputError

METADATA = ".metadata"


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Where a chunk's bytes are."""

    path: Path
    offset: int
    size: int


def is_distributed(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint."""
    return (folder / METADATA).is_file()


@contextlib.contextmanager
def _metadata_of(folder: Path) -> Iterator[dict[str, Any]]:
    """What `.metadata` has, and InputError for what is not as PyTorch writes it."""
    file = folder / METADATA
    metadata = read_pickle(file.read_bytes(), str(file), builders=BUILDERS)
    with contents_named(file):
        yield metadata.state


class DistributedCheckpoint:
    """A distributed checkpoint of PyTorch; a `Source`.

    Args:
        folder: with `.metadata`.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def leaves(self) -> Mapping[str, Merged]:
        """Each tensor by its name; of plain values such as learning rates there are none.

        Raises:
            InputError: a file is missing or damaged, or chunks do not make up a tensor.
        """
        with _metadata_of(self._folder) as metadata:
            chunks = self._chunks(metadata["storage_data"])
            leaves = {}
            for name, entry in metadata["state_dict_metadata"].items():
                if "chunks" in (entry.state or {}):
                    leaves[name] = self._leaf(name, entry.state, chunks[name])
        return leaves

    def archives(self) -> list[tuple[Path, int, int]]:
        """The zip archive of each chunk: its file, first byte and size.

        Raises:
            InputError: as `leaves`.
        """
        with _metadata_of(self._folder) as metadata:
            chunks = self._chunks(metadata["storage_data"])
        places = [chunk for by_offset in chunks.values() for chunk in by_offset.values()]
        return [(chunk.path, chunk.offset, chunk.size) for chunk in places]

    def _chunks(self, storage: dict[Named, Named]) -> dict[str, dict[tuple[int, ...], _Chunk]]:
        """Each tensor's chunks by their first element."""
        found: dict[str, dict] = collections.defaultdict(dict)
        for index, place in storage.items():
            offset = index.state.get("offset")  # that of plain values is left out
            if offset is not None:
                found[index.state["fqn"]][offset] = self._place(place.state)
        return found

    def _place(self, state: dict[str, Any]) -> _Chunk:
        name = state["relative_path"]
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder.resolve()):
            raise InputError("checkpoint", name, "a file in the checkpoint's folder")
        if not path.is_file():
            raise InputError("checkpoint", str(path), "a file, which the metadata names")
        if state.get("transform_descriptors"):
            raise InputError("checkpoint", state["transform_descriptors"], "chunks as they are")
        return _Chunk(path, state["offset"], state["length"])

    def _leaf(
        self,
        name: str,
        state: dict[str, Any],
        chunks: dict[tuple[int, ...], _Chunk],
    ) -> Merged:
        shape = state["size"]
        dtype = torch_dtype(_properties(state["properties"]))
        placements = []
        for chunk in state["chunks"]:
            corner, sizes = chunk.state["offsets"], chunk.state["sizes"]
            if 0 in sizes:
                continue
            place = chunks[corner]
            origin = f"{place.path.name} at byte {place.offset}"
            part = _tensor(place, sizes, origin)
            ones, zeros = (1,) * len(shape), (0,) * len(shape)
            placements.append(Placement(part, zeros, corner, sizes, ones, origin))
        return Merged(name, shape, dtype, (tuple(placements),))


def _tensor(chunk: _Chunk, sizes: tuple[int, ...], origin: str) -> Tensor:
    part = load_torch(chunk.path, chunk.offset, chunk.size)
    if not isinstance(part, Tensor) or part.shape != sizes:
        raise InputError(origin, getattr(part, "shape", part), f"a tensor of shape {sizes}")
    return part


def _properties(properties: Named) -> Any:
    """The type that a tensor's properties name."""
    state = properties.state
    return state["dtype"] if isinstance(state, dict) else state[0]
