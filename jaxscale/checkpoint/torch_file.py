"""Files of `torch.save`: read without torch and without running what they name, and written.

Such a file is a zip archive of one pickle, `data.pkl`, and one uncompressed member a storage. Its
tensors become arrays that are read where they are indexed.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxscale.checkpoint.boxes import box_of
from jaxscale.checkpoint.file_array import FileArray
from jaxscale.checkpoint.pickled import Build, Named, read_pickle
from jaxscale.checkpoint.zipped import stored_members
from jaxscale.types import InputError

DTYPES = {
    "float64": np.dtype("f8"),
    "float32": np.dtype("f4"),
    "float16": np.dtype("f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype("i8"),
    "int32": np.dtype("i4"),
    "int16": np.dtype("i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype(bool),
}
STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "Untyped": "uint8",
}


@dataclasses.dataclass(frozen=True)
class Permuted:
    """An array whose dims lie in a file in another order; a `LazyArray`.

    Args:
        array: as it lies in the file.
        axes: for each dim, which of the array's it is.
    """

    array: FileArray
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.array.shape[axis] for axis in self.axes)

    @property
    def dtype(self) -> np.dtype:
        """Its type."""
        return self.array.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads one box."""
        corner, sizes = box_of(index, self.shape)
        stored = [slice(None)] * len(self.axes)
        for axis, start, size in zip(self.axes, corner, sizes):
            stored[axis] = slice(start, start + size)
        return np.transpose(self.array[tuple(stored)], self.axes)


Tensor = FileArray | Permuted


def load_torch(path: Path, begin: int = 0, size: int | None = None) -> Any:
    """What a file of `torch.save` holds: containers, plain values, tensors and `Named`.

    Args:
        path: of the file.
        begin: where in the file it begins.
        size: bytes of it; to the end of the file when None.
    Raises:
        InputError: it is damaged, or was written by torch before 1.6.
    """
    members = {}
    for member, place in stored_members(path, begin, size).items():
        _, _, name = member.partition("/")
        members[name] = place
    if "data.pkl" not in members:
        raise InputError("checkpoint", str(path), "a file of torch.save; it has no data.pkl")
    if _bytes(path, members, "byteorder") not in (b"", b"little"):
        raise InputError("checkpoint", str(path), "little-endian tensors")

    def storage(key: tuple) -> FileArray:
        kind, storage_type, name, _, num_elements = key
        if kind != "storage" or f"data/{name}" not in members:
            raise ValueError(f"no storage {name!r}")
        offset, size = members[f"data/{name}"]
        whole = FileArray(path, offset, (num_elements,), _storage_dtype(storage_type))
        if whole.num_bytes > size:
            raise ValueError(f"storage {name!r} has {size} bytes of {whole.num_bytes}")
        return whole

    pickle = _bytes(path, members, "data.pkl")
    return read_pickle(pickle, str(path), builders=BUILDERS, persistent=storage)


def torch_dtype(value: Any) -> np.dtype:
    """The type that a file names, such as torch.bfloat16.

    Raises:
        ValueError: it has no equal in NumPy.
    """
    name = value.name.removeprefix("torch.") if isinstance(value, Named) else str(value)
    if name not in DTYPES:
        raise ValueError(f"tensors of type {name} are not read")
    return DTYPES[name]


def _bytes(path: Path, members: dict[str, tuple[int, int]], name: str) -> bytes:
    offset, size = members.get(name, (0, 0))
    return FileArray(path, offset, (size,), np.dtype("u1"))[:].tobytes()


def _storage_dtype(kind: Any) -> np.dtype:
    name = kind.name.rpartition(".")[2].removesuffix("Storage")
    if name not in STORAGES:
        raise ValueError(f"storages of type {kind.name} are not read")
    return DTYPES[STORAGES[name]]


def _tensor(
    storage: FileArray,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: Any,
) -> Tensor:
    """A tensor of a storage, whose dims may lie in any order but without gaps."""
    shape = tuple(size)
    # The stride of a dim of size 1 means nothing.
    order = sorted(range(len(shape)), key=lambda dim: (-stride[dim], dim))
    wanted = 1
    for dim in reversed(order):
        if shape[dim] != 1 and math.prod(shape) and stride[dim] != wanted:
            raise ValueError(f"a tensor of shape {shape} with strides {tuple(stride)} has gaps")
        wanted *= shape[dim]
    end = offset + math.prod(shape)
    if not 0 <= offset <= end <= storage.shape[0]:
        raise ValueError(f"a tensor of elements {offset} to {end} of {storage.shape[0]}")
    stored = storage.part(offset, tuple(shape[dim] for dim in order))
    axes = tuple(order.index(dim) for dim in range(len(shape)))
    if axes == tuple(range(len(shape))):
        return stored
    return Permuted(stored, axes)


def _typed_tensor(
    storage: FileArray,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: Named,
    *_: Any,
) -> Tensor:
    """A tensor of an untyped storage; its offset counts elements."""
    kind = torch_dtype(dtype)
    num_elements = storage.num_bytes // kind.itemsize
    typed = FileArray(storage.path, storage.offset, (num_elements,), kind)
    return _tensor(typed, offset, size, stride)


def _of_type(function: Named, _type: Any, arguments: tuple, _state: Any) -> Any:
    """A tensor of a subclass, as the tensor that it is."""
    return BUILDERS[function.name](*arguments)


def _first(value: Any, *_: Any) -> Any:
    return value


BUILDERS: Mapping[str, Build] = {
    "collections.OrderedDict": dict,
    "collections.defaultdict": lambda *_: {},
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
}
