"""Files of `torch.save`: read without torch and without running what they name, and written.

Such a file is a zip archive of one pickle, `data.pkl`, and one uncompressed member a storage. Its
tensors become arrays that are read where they are indexed.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxscale.checkpoint.file_array import FileArray
from jaxscale.checkpoint.pickled import Build, Named, read_pickle
from jaxscale.checkpoint.views import Permuted
from jaxscale.checkpoint.zipped import Member, check_member, stored_members
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

PICKLE = "data.pkl"
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
        if name in members:
            raise InputError("checkpoint", str(path), f"one member {name}")
        members[name] = place
    if PICKLE not in members:
        raise InputError("checkpoint", str(path), f"a file of torch.save; it has no {PICKLE}")
    if _bytes(path, members, "byteorder") not in (b"", b"little"):
        raise InputError("checkpoint", str(path), "little-endian tensors")

    def storage(key: tuple) -> FileArray:
        kind, storage_type, name, _, num_elements = key
        if kind != "storage" or f"data/{name}" not in members:
            raise ValueError(f"no storage {name!r}")
        member = members[f"data/{name}"]
        whole = FileArray(path, member.offset, (num_elements,), _storage_dtype(storage_type))
        if whole.num_bytes > member.size:
            raise ValueError(f"storage {name!r} has {member.size} bytes of {whole.num_bytes}")
        return whole

    # It says which numbers belong where; those are compared by `check_archive`.
    check_member(path, PICKLE, members[PICKLE])
    pickle = _bytes(path, members, PICKLE)
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


def _bytes(path: Path, members: dict[str, Member], name: str) -> bytes:
    member = members.get(name, Member(0, 0, 0))
    return FileArray(path, member.offset, (member.size,), np.dtype("u1"))[:].tobytes()


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
    requires_grad: bool = False,
    hooks: Any = None,
    signs: Any = None,
) -> Tensor:
    """A tensor of a storage, whose dims may lie in any order but without gaps."""
    if signs:
        raise ValueError(f"a tensor whose values are those of its storage but for {list(signs)}")
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
