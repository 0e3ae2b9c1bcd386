"""The leaves of our own checkpoints on disk: read as a source, written in parts."""

import dataclasses
import functools
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from jaxscale.checkpoint import manifest
from jaxscale.checkpoint.file_array import is_plain_name
from jaxscale.checkpoint.remote import RemotePath
from jaxscale.checkpoint.source import contents_named
from jaxscale.types import InputError

STATE = "state"
PARAMS = "params/"  # what the paths of parameters begin with
AVERAGES = "opt_state/2/average/"  # and those of their averages, see `train.average`
NUM_AVERAGED = "opt_state/2/count"  # the updates that these are of
SEPARATOR = "/"
FILE_SEPARATOR = "."
EMPTY = {"value_type": "None", "skip_deserialize": True}
ARRAYS = "array_metadatas"
ITEM, KEY = 1, 2  # orbax's numbers for a place in a sequence and a key of a mapping


def is_native(folder: Path) -> bool:
    """Whether a folder is one of our committed steps."""
    return (folder / manifest.MANIFEST).is_file() and (folder / STATE).is_dir()


class NativeArray:
    """A leaf of a committed step; a `LazyArray`.

    Args:
        folder: of the leaf.
    Raises:
        InputError: it is damaged.
    """

    def __init__(self, folder: Path | RemotePath):
        self._folder = folder
        try:
            self._store = ts.open(_spec(folder), open=True, read=True).result()
        except ValueError as error:
            raise InputError("checkpoint", str(folder), f"a sound leaf ({error})") from error
        self.shape: tuple[int, ...] = tuple(self._store.shape)
        self.dtype: np.dtype = self._store.dtype.numpy_dtype
        # The sizes of the boxes in which it is stored, each of which is read as a whole.
        self.chunk: tuple[int, ...] = tuple(self._store.chunk_layout.read_chunk.shape or ())

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads one box."""
        try:
            return np.asarray(self._store[index].read().result())
        except ValueError as error:
            raise InputError("checkpoint", str(self._folder), f"a sound leaf ({error})") from error


@dataclasses.dataclass(frozen=True)
class TreeForm:
    """What the paths of a tree's leaves do not say of it.

    Args:
        items: paths of nodes and leaves that are items of a list or tuple.
        keys: the leaves that are typed PRNG keys, with the name of their implementation.
        empty: paths of nodes without leaves.
    """

    items: frozenset[str] = frozenset()
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    empty: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tree: Any) -> "TreeForm":
        """The form of a tree of arrays or jax.ShapeDtypeStruct."""
        items, implementations, empty = set(), {}, set()

        def is_empty(node: Any) -> bool:
            return not jax.tree.leaves(node)

        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_empty):
            for end, key in enumerate(path, 1):
                if isinstance(key, jax.tree_util.SequenceKey):
                    items.add(_joined(path[:end]))
            if is_empty(leaf):
                empty.add(_joined(path))
            elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                implementations[_joined(path)] = key_implementation(leaf)
        return cls(frozenset(items), implementations, frozenset(empty))


class NativeCheckpoint:
    """A committed step; a `Source`.

    Args:
        folder: of the step.
    Raises:
        InputError: its list of leaves is damaged.
    """

    def __init__(self, folder: Path | RemotePath):
        self._state = folder / STATE
        self._folder = folder
        self._paths: list[str] = []
        with contents_named(self._state):
            self.form = self._read_form()

    def _read_form(self) -> TreeForm:
        """Reads the list of leaves into `_paths`; returns what they do not say."""
        listed = self._json("_METADATA")["tree_metadata"].values()
        items, empty = set(), set()
        for entry in listed:
            keys = entry["key_metadata"]
            names = [key["key"] for key in keys]
            if not all(map(is_plain_name, names)):
                raise InputError("checkpoint", names, "names that cannot lead out of the folder")
            for end, key in enumerate(keys, 1):
                if key["key_type"] == ITEM:
                    items.add(SEPARATOR.join(names[:end]))
            is_empty = entry["value_metadata"]["skip_deserialize"]
            (empty.add if is_empty else self._paths.append)(SEPARATOR.join(names))
        return TreeForm(frozenset(items), self._keys(), frozenset(empty))

    def leaves(self, within: str = "", left_out: tuple[str, ...] = ()) -> Mapping[str, NativeArray]:
        """Each leaf by its path; nothing of them is read.

        Args:
            within: what the paths in the state begin with, which is left out.
            left_out: sections after that, of which no leaf is returned.
        """
        found = {}
        for path in self._paths:
            name = path.removeprefix(within)
            if path.startswith(within) and name.partition("/")[0] not in left_out:
                found[name] = NativeArray(self._state / leaf_folder(path))
        return found

    def params(
        self,
        left_out: tuple[str, ...] = (),
        *,
        is_averaged: bool = False,
    ) -> Mapping[str, NativeArray]:
        """The parameters by their paths; nothing of them is read.

        Args:
            left_out: sections of which none is returned.
            is_averaged: whether the average stands in the place of each that was trained.
        Raises:
            InputError: the checkpoint has no averages, or no update has been made since they began.
        """
        found = self.leaves(PARAMS, left_out)
        if not is_averaged:
            return found
        if NUM_AVERAGED not in self._paths:
            expected = "a checkpoint of a run with OptimizerConfig.average_decay"
            raise InputError("checkpoint", str(self._folder), expected)
        if not self.leaves(NUM_AVERAGED)[""][()]:
            expected = "a checkpoint after the first update, which an average begins with"
            raise InputError("checkpoint", str(self._folder), expected)
        return found | self.leaves(AVERAGES, left_out)

    def record(self, item: str) -> dict[str, Any]:
        """What a step has beside its state: "data", the loader's position, or "meta", facts."""
        return _read_json(self._folder / item / "metadata")

    def _keys(self) -> dict[str, str]:
        folders = {leaf_folder(path): path for path in self._paths}
        found = {}
        for entry in self._json(ARRAYS, "process_0")["array_metadatas"]:
            array = entry["array_metadata"]
            extra = array["ext_metadata"] or {}
            if "random_key_impl" in extra:
                found[folders[array["param_name"]]] = extra["random_key_impl"]
        return found

    def _json(self, *names: str) -> Any:
        return _read_json(functools.reduce(operator.truediv, names, self._state))


def check_storable(tree: Any) -> None:
    """Checks that each leaf of a tree has a folder of its own, and elements.

    Args:
        tree: of arrays or jax.ShapeDtypeStruct.
    Raises:
        InputError: a key has a "/", two paths become one folder, or an array is empty.
    """
    folders: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        whole = SEPARATOR.join(names)
        if not all(map(is_plain_name, names)):
            raise InputError("state", whole, f"keys without {SEPARATOR!r}")
        other = folders.setdefault(leaf_folder(whole), whole)
        if other != whole:
            expected = f"paths that differ in more than a {FILE_SEPARATOR!r}"
            raise InputError("state", [other, whole], expected)
        if 0 in leaf.shape:
            raise InputError("state", f"{whole} of shape {leaf.shape}", "arrays with elements")


def create_leaf(
    state: Path,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    chunk: tuple[int, ...],
) -> Any:
    """Creates a leaf, or opens it where it was created in the same way.

    Args:
        state: the folder of the state.
        path: of the leaf.
        shape: of the leaf.
        dtype: of the leaf.
        chunk: sizes of the boxes in which it is stored; one file each.
    Returns:
        A tensorstore to write to.
    """
    metadata = {"shape": shape, "chunks": chunk, "compressor": None}
    return ts.open(
        _spec(state / leaf_folder(path))
        | {"metadata": metadata, "store_data_equal_to_fill_value": True},
        dtype=ts.dtype(dtype),
        create=True,
        open=True,
    ).result()


def leaf_folder(path: str) -> str:
    """The name of a leaf's folder."""
    return path.replace(SEPARATOR, FILE_SEPARATOR)


def write_tree(
    state: Path,
    chunks: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    form: TreeForm,
) -> None:
    """Writes what orbax reads of the leaves: their names, shapes and chunks.

    Args:
        state: the folder of the state.
        chunks: (shape, chunk) of each leaf by path.
        form: of the tree.
    """
    entries, arrays = {}, []
    for path in sorted((*form.empty, *chunks), key=_in_order):
        keys, names = [], path.split(SEPARATOR)
        for end, name in enumerate(names, 1):
            is_item = SEPARATOR.join(names[:end]) in form.items
            keys.append({"key": name, "key_type": ITEM if is_item else KEY})
        value = EMPTY
        if path in chunks:
            shape, chunk = chunks[path]
            value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape}
            extra = {"random_key_impl": form.keys[path]} if path in form.keys else None
            array = {"write_shape": shape, "chunk_shape": chunk, "ext_metadata": extra}
            arrays.append({"array_metadata": {"param_name": leaf_folder(path)} | array})
        entries[str(tuple(names))] = {"key_metadata": keys, "value_metadata": value}
    tree = {
        "tree_metadata": entries,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
        "value_metadata_tree": None,
    }
    (state / "_METADATA").write_text(json.dumps(tree))
    folder = state / ARRAYS
    folder.mkdir(exist_ok=True)
    (folder / "process_0").write_text(json.dumps({"array_metadatas": arrays}))


def key_implementation(leaf: Any) -> str:
    """The name of what a typed key is for, also where only its shape is known."""
    names = []
    jax.eval_shape(lambda key: names.append(jax.random.key_impl(key)), leaf)
    return str(names[0])


def _read_json(file: Path | RemotePath) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError("checkpoint", str(file), f"a sound list of leaves ({error})") from None


def _in_order(path: str) -> list[tuple[int, str]]:
    """Sorts items of a sequence by their numbers, as orbax wants them."""
    return [(int(name) if name.isdecimal() else -1, name) for name in path.split(SEPARATOR)]


def _joined(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=SEPARATOR)


def _spec(folder: Path | RemotePath) -> dict[str, Any]:
    if isinstance(folder, RemotePath):
        return {"driver": "zarr", "kvstore": folder.kvstore}
    kvstore = {"driver": "file", "path": f"{folder.absolute()}/"}
    return {"driver": "zarr", "kvstore": kvstore}
