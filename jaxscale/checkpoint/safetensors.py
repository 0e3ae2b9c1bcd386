"""Folders of safetensors, in one file or sharded with an index, as sources and as targets.

A file is the size of a JSON header (8 bytes, little endian), the header with type, shape and bytes
of each tensor, and the tensors' bytes. Source: the format of github.com/huggingface/safetensors.
Nothing of it is executed, and a header is believed only once its sizes fit the file.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxscale.types import InputError, check_positive

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{number:05d}-of-{count:05d}.safetensors"
METADATA = "__metadata__"
PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # as the format's own reader
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, a `LazyArray`.

    Args:
        file: that holds it.
        offset: of its first byte in the file.
        shape: its sizes.
        dtype: its type.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """A copy of one box; () is the whole tensor, which is in memory once.

        For a box the file is mapped for this read alone: pages of a map would count as this
        process's memory until the system is short of it.
        """
        if math.prod(self.shape) == 0:  # cannot be mapped
            return np.zeros(self.shape, self.dtype)[index]
        if index == ():
            whole = np.empty(self.shape, self.dtype)
            with self.file.open("rb") as file:
                file.seek(self.offset)
                if file.readinto(whole.reshape(-1).view(np.uint8)) < whole.nbytes:
                    expected = f"{whole.nbytes} bytes of a tensor at {self.offset}"
                    raise InputError(str(self.file), "a file that has become shorter", expected)
            return whole
        stored = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        return np.array(stored[index])


class SafetensorsSource:
    """The tensors of a folder by name; nothing of them is read until they are indexed.

    Args:
        directory: the folder, with `model.safetensors` or `model.safetensors.index.json`.

    Raises:
        InputError: the folder has neither, a shard is missing, or a file is damaged; it names the
            file, and the tensor where there is one.
    """

    def __init__(self, directory: str | Path):
        folder = Path(directory).expanduser()
        index = folder / INDEX
        if index.is_file():
            self._leaves = _read_sharded(folder, _read_index(index))
        elif (folder / SINGLE).is_file():
            self._leaves = read_header(folder / SINGLE)
        else:
            expected = f"a folder with {SINGLE} or {INDEX}; no other form of weights is read"
            raise InputError("source", str(folder), expected)

    def leaves(self) -> Mapping[str, StoredTensor]:
        """Each tensor by its name."""
        return self._leaves


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; nothing of them is read.

    Raises:
        InputError: the file is missing or truncated, or its header contradicts itself or the
            file's size.
    """
    size = _size_of(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(PREFIX_BYTES), "little")
        begin = PREFIX_BYTES + length
        if not 2 <= length <= MAX_HEADER_BYTES or begin > size:
            expected = f"a header that fits the file's {size} bytes"
            raise InputError(str(file), f"a header of {length} bytes", expected)
        header = _json_object(file, stream.read(length))
    header.pop(METADATA, None)
    tensors, end = {}, begin
    for name, entry in sorted(header.items(), key=_first_byte(file)):
        tensor = _tensor(file, name, entry, begin)
        if tensor.offset != end:
            expected = f"its first byte at {end - begin}, where the tensor before it ends"
            raise InputError(f"{file}: {name}", entry, expected)
        end += math.prod(tensor.shape) * tensor.dtype.itemsize
        if end > size:
            expected = f"a file of at least {end} bytes; it is truncated to {size}"
            raise InputError(f"{file}: {name}", entry, expected)
        tensors[name] = tensor
    if end != size:
        raise InputError(str(file), f"{size} bytes", f"{end} bytes, as its header says")
    return tensors


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to be written.

    Args:
        name: its name.
        shape: its sizes.
        dtype: its type.
        make: returns its values; called once, when they are written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_safetensors(
    directory: str | Path,
    tensors: Sequence[NewTensor],
    *,
    max_shard_bytes: int,
) -> None:
    """Writes tensors in their order, in one file or in shards with an index.

    Args:
        directory: the folder, which exists; files of the same names are replaced when whole.
        tensors: what to write; one of them is in memory at a time.
        max_shard_bytes: largest file, unless one tensor alone is larger.
    """
    check_positive("max_shard_bytes", max_shard_bytes)
    folder = Path(directory).expanduser()
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        # Readers would go on with what an index of other weights names.
        (folder / INDEX).unlink(missing_ok=True)
        return
    # It would go on with names of shards, of which some are new and some are not.
    (folder / INDEX).unlink(missing_ok=True)
    places = {}
    for number, shard in enumerate(shards, 1):
        name = SHARD.format(number=number, count=len(shards))
        write_file(folder / name, shard)
        places |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _replace(folder / INDEX, lambda stream: stream.write(json.dumps(index, indent=1).encode()))
    (folder / SINGLE).unlink(missing_ok=True)


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor; a file is a plain name, so that no index leaves its folder."""
    places = _json_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(places, dict):
        raise InputError(f"{index}: weight_map", places, "the file of each tensor by its name")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index}: {name}", file, "the name of a file in the same folder")
    return places


def _read_sharded(folder: Path, places: dict[str, str]) -> dict[str, StoredTensor]:
    first = {}
    for name, file in places.items():
        first.setdefault(file, name)
    found = {}
    for file, name in sorted(first.items()):
        if not (folder / file).is_file():
            expected = f"a file of {folder}, for {name} and others; the shard is missing"
            raise InputError(f"{folder / INDEX}: {name}", file, expected)
        for each, tensor in read_header(folder / file).items():
            if places.get(each) != file:
                expected = f"{places.get(each)!r}, where {INDEX} has it"
                raise InputError(f"{folder / file}: {each}", file, expected)
            found[each] = tensor
    for name, file in places.items():
        if name not in found:
            expected = f"a tensor of {file}, where {INDEX} has it"
            raise InputError(f"{folder / file}: {name}", None, expected)
    return found


def _first_byte(file: Path) -> Callable[[tuple[str, Any]], int]:
    def first(item: tuple[str, Any]) -> int:
        name, entry = item
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (_are_sizes(offsets) and len(offsets) == 2):
            expected = "a type, a shape and data_offsets, the first and last of its bytes"
            raise InputError(f"{file}: {name}", entry, expected)
        return offsets[0]

    return first


def _tensor(file: Path, name: str, entry: dict[str, Any], begin: int) -> StoredTensor:
    dtype, shape = DTYPES.get(entry.get("dtype")), entry.get("shape")
    if dtype is None:
        expected = f"one of {', '.join(DTYPES)}"
        raise InputError(f"{file}: {name}: dtype", entry.get("dtype"), expected)
    if not _are_sizes(shape):
        raise InputError(f"{file}: {name}: shape", shape, "its sizes")
    first, last = entry["data_offsets"]
    num_bytes = math.prod(shape) * dtype.itemsize
    if last - first != num_bytes:
        expected = f"{num_bytes} bytes, those of {entry['dtype']}{shape}"
        raise InputError(f"{file}: {name}", f"{last - first} bytes", expected)
    return StoredTensor(file, begin + first, tuple(shape), dtype)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(each) is int and each >= 0 for each in values)


def _json_object(file: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(str(file), content[:40], f"a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise InputError(str(file), content[:40], "a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise InputError(str(file), None, f"a file ({error.strerror})") from None


def _shards(tensors: Sequence[NewTensor], max_bytes: int) -> Iterator[list[NewTensor]]:
    shard, size = [], 0
    for tensor in tensors:
        if shard and size + tensor.num_bytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.num_bytes
    yield shard


def write_file(file: Path, tensors: Sequence[NewTensor]) -> None:
    """Writes tensors in their order to one file, which is there whole or not at all."""
    header: dict[str, Any] = {METADATA: {"format": "pt"}}  # which transformers asks for
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": CODES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % PREFIX_BYTES)  # so that the tensors are aligned

    def write(stream: Any) -> None:
        stream.write(len(text).to_bytes(PREFIX_BYTES, "little"))
        stream.write(text)
        for tensor in tensors:
            values = np.asarray(tensor.make(), tensor.dtype)
            if values.shape != tensor.shape:
                raise ValueError(f"{tensor.name} has {values.shape}, planned {tensor.shape}")
            stream.write(values.tobytes())

    _replace(file, write)


def _replace(file: Path, write: Callable[[Any], Any]) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = file.with_name(f".{file.name}.part")
    with temporary.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
