"""Any source to a checkpoint of our own, in pieces, so that no array is ever whole in memory.

The pieces are the chunk files of the new checkpoint. One that exists is whole, because tensorstore
renames it when it is written; so a conversion that was killed goes on with those that are missing.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxscale.checkpoint import handlers, manifest, native
from jaxscale.checkpoint.boxes import boxes, chunk_shape
from jaxscale.checkpoint.file_array import is_plain_name
from jaxscale.checkpoint.source import LazyArray
from jaxscale.types import InputError, check_positive

VERSION = 1
PLAN = "conversion.json"
UNFINISHED = ".conversion"
HANDLER = "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler"
HANDLERS = {"data": HANDLER, "meta": HANDLER, "state": "jaxscale.checkpoint.handlers.LeafFolders"}
# Of a chunk there are at once the parts that make it up, a copy to compare with, what tensorstore
# compresses, and the compressed bytes; a mean adds up in float64.
MAX_COPIES = 8
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Destination:
    """The checkpoint that a conversion writes.

    Args:
        directory: of the checkpoints.
        step: its number.
        fingerprint: facts of the model, as `Checkpoints` takes them.
        data_state: position of the loader; empty where the source has none.
        form: of the state's tree.
    """

    directory: Path
    step: int
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_state: dict[str, Any] = dataclasses.field(default_factory=dict)
    form: native.TreeForm = native.TreeForm()

    @property
    def path(self) -> Path:
        """The folder of the committed step."""
        return self.directory / str(self.step)

    @property
    def unfinished(self) -> Path:
        """Where the step is until it is committed."""
        return self.directory / f"{self.step}{UNFINISHED}"


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One leaf of the source and how it is stored."""

    path: str
    array: LazyArray
    chunk: tuple[int, ...]

    def file(self, state: Path, box: tuple[slice, ...]) -> Path:
        """The file of a box."""
        numbers = [part.start // step for part, step in zip(box, self.chunk)]
        name = ".".join(map(str, numbers)) or "0"
        return state / native.leaf_folder(self.path) / name


def convert(
    leaves: Mapping[str, LazyArray],
    destination: Destination,
    *,
    identity: str,
    budget_bytes: int,
    num_workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes a source's arrays as a committed step; goes on where a killed conversion stopped.

    Args:
        leaves: of the source, by their paths in the new checkpoint.
        destination: the new checkpoint.
        identity: of the source's files; a conversion goes on only with the same source.
        budget_bytes: of host memory, also where a leaf is larger.
        num_workers: pieces at once; the number of cores when None.
        progress: called with the bytes done and those of all leaves.
    Raises:
        InputError: the step exists, another conversion is at work or half done there, the source is
            damaged, or the disk refuses.
    """
    num_workers = num_workers or os.cpu_count() or 1
    check_positive("budget_bytes", budget_bytes)
    limit = min(handlers.CHUNK_BYTES, budget_bytes // (MAX_COPIES * num_workers))
    plan = _plan(leaves, limit)
    folder = destination.unfinished
    expected = f"a folder in which {destination.path} can be written"
    written = handlers.write_errors_named("destination", destination.directory, expected)
    with written, _held(destination):
        if destination.path.exists():
            expected = "a step that does not exist yet"
            raise InputError("destination", str(destination.path), expected)
        _begin(folder, plan, identity)
        _write_all(folder / native.STATE, plan, num_workers, progress)
        chunks = {leaf.path: (leaf.array.shape, leaf.chunk) for leaf in plan}
        native.write_tree(folder / native.STATE, chunks, destination.form)
        _commit(folder, destination)


@contextlib.contextmanager
def _held(destination: Destination) -> Iterator[None]:
    """Keeps other conversions out of the folder; the system lets go when this process ends."""
    destination.directory.mkdir(parents=True, exist_ok=True)
    folder = os.open(destination.directory, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        expected = "a folder into which no other process is converting"
        raise InputError("destination", str(destination.directory), expected) from None
    finally:
        os.close(folder)


def _write_all(state: Path, plan: list[_Leaf], num_workers: int, progress: Progress) -> None:
    total = sum(_num_bytes(leaf.array) for leaf in plan)
    done = 0
    for num_bytes in _written(state, plan, num_workers):
        done += num_bytes
        progress(done, total)


def _plan(leaves: Mapping[str, LazyArray], limit: int) -> list[_Leaf]:
    plan, folders = [], {}
    for path, array in leaves.items():
        folder = native.leaf_folder(path)
        if not is_plain_name(folder):
            raise InputError("leaves", path, "paths that can be a folder's name")
        if folder in folders:
            raise InputError(
                "leaves", [path, folders[folder]], "paths that differ in more than a '.'"
            )
        folders[folder] = path
        chunk = chunk_shape(array.shape, array.dtype.itemsize, limit)
        plan.append(_Leaf(path, array, chunk))
    return plan


def _begin(folder: Path, plan: list[_Leaf], identity: str) -> None:
    """Notes what is being converted, or checks that a conversion begun before was of the same."""
    text = json.dumps({"version": VERSION, "source": identity, "leaves": _described(plan)})
    note = folder / PLAN
    if note.exists():
        if note.read_text() != text:
            expected = "the same source, leaves and budget, or that folder deleted to begin anew"
            raise InputError("destination", str(folder), f"a half-done conversion of {expected}")
        return
    if folder.exists():  # killed before the note was whole
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    temporary = note.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(note)


def _described(plan: list[_Leaf]) -> dict[str, Any]:
    return {leaf.path: [leaf.array.shape, str(leaf.array.dtype), leaf.chunk] for leaf in plan}


def _written(state: Path, plan: list[_Leaf], num_workers: int) -> Iterator[int]:
    """Writes what is missing; yields the bytes of each piece. `num_workers` are under way."""
    waiting: set[concurrent.futures.Future] = set()
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        for leaf in plan:
            array = leaf.array
            store = native.create_leaf(state, leaf.path, array.shape, array.dtype, leaf.chunk)
            for box in boxes(array.shape, leaf.chunk):
                waiting.add(pool.submit(_write, store, leaf.array, box, leaf.file(state, box)))
                if len(waiting) == num_workers:
                    done, waiting = concurrent.futures.wait(
                        waiting, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    yield from (future.result() for future in done)
        yield from (future.result() for future in waiting)


def _write(store: Any, array: LazyArray, box: tuple[slice, ...], file: Path) -> int:
    if not file.exists():
        store[box].write(array[box]).result()
    sizes = [part.stop - part.start for part in box]
    return math.prod(sizes) * array.dtype.itemsize


def _num_bytes(array: LazyArray) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _commit(folder: Path, destination: Destination) -> None:
    """Writes what a committed step has beside its leaves, and gives it its name."""
    items = {"meta": {"fingerprint": destination.fingerprint}, "data": destination.data_state}
    for name, content in items.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "metadata").write_text(json.dumps(content))
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": HANDLERS}))
    manifest.write_manifest(folder)
    folder.rename(destination.path)
