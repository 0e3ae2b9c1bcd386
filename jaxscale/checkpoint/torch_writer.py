"""Files that `torch.load` reads, written without torch and a piece of an array at a time."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale.checkpoint.boxes import write_rows
from jaxscale.checkpoint.source import LazyArray
from jaxscale.checkpoint.torch_file import DTYPES, STORAGES
from jaxscale.types import InputError

PROTOCOL = b"\x80\x02"
MARK, STOP, TUPLE, REDUCE = b"(", b".", b"t", b"R"
EMPTY_DICT, SET_ITEMS, EMPTY_LIST, APPENDS, EMPTY_TUPLE = b"}", b"u", b"]", b"e", b")"
NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"
PERSISTENT = b"Q"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
NO_HOOKS = b"ccollections\nOrderedDict\n" + EMPTY_TUPLE + REDUCE
STORAGE_OF = {DTYPES[name]: f"{kind}Storage" for kind, name in STORAGES.items()}
STORAGE_OF[np.dtype("u1")] = "ByteStorage"


def save_torch(path: Path, content: Any, *, piece_bytes: int) -> None:
    """Writes what `torch.load` reads as the same dicts, lists, tuples, values and tensors.

    Args:
        path: of the file, which must not exist.
        content: its arrays may be lazy; they are read and written in pieces.
        piece_bytes: of an array in memory at once.
    """
    arrays: list[LazyArray] = []
    pickle = PROTOCOL + _pickled(content, arrays) + STOP
    with path.open("xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        for number, array in enumerate(arrays):
            with archive.open(f"archive/data/{number}", "w", force_zip64=True) as member:
                write_rows(member, array, piece_bytes)
        archive.writestr("archive/version", "3\n")


def _pickled(value: Any, arrays: list[LazyArray]) -> bytes:
    """The opcodes that push a value; its arrays are added to `arrays`."""
    if value is None or isinstance(value, bool):
        return {None: NONE, True: TRUE, False: FALSE}[value]
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, dict):
        items = (_pickled(each, arrays) for item in value.items() for each in item)
        return EMPTY_DICT + MARK + b"".join(items) + SET_ITEMS
    if isinstance(value, list | tuple):
        items = b"".join(_pickled(item, arrays) for item in value)
        return EMPTY_LIST + MARK + items + APPENDS if isinstance(value, list) else _tuple(items)
    return _tensor(value, arrays)


def _tuple(items: bytes) -> bytes:
    return MARK + items + TUPLE


def _tensor(array: LazyArray, arrays: list[LazyArray]) -> bytes:
    """A contiguous tensor whose storage is the next one."""
    if array.dtype not in STORAGE_OF:
        expected = f"one of torch: {', '.join(map(str, STORAGE_OF))}"
        raise InputError("type of an array", str(array.dtype), expected)
    kind = f"ctorch\n{STORAGE_OF[array.dtype]}\n".encode()
    num_elements = int(np.prod(array.shape, dtype=np.int64))
    strides = [
        int(np.prod(array.shape[dim + 1 :], dtype=np.int64)) for dim in range(len(array.shape))
    ]
    storage = b"".join(
        [
            _pickled("storage", []),
            kind,
            _pickled(str(len(arrays)), []),
            _pickled("cpu", []),
            _pickled(num_elements, []),
        ]
    )
    arrays.append(array)
    arguments = b"".join(
        [
            _tuple(storage) + PERSISTENT,
            _pickled(0, []),
            _pickled(tuple(array.shape), []),
            _pickled(tuple(strides), []),
            FALSE,
            NO_HOOKS,
        ]
    )
    return REBUILD + _tuple(arguments) + REDUCE
