"""Plain per-rank files: a folder of `.npz`, one a rank, with the rules that say what they hold.

`tensor=0,pipeline=1.npz` holds the arrays of that rank under any names, and `rules.toml` beside it
is as in `patterns`. A model on one rank is `all.npz`; without rules each name is a whole parameter.
"""

import re
import tokenize
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxscale.checkpoint.boxes import Merged, write_rows
from jaxscale.checkpoint.file_array import FileArray
from jaxscale.checkpoint.patterns import Rule, load_rules
from jaxscale.checkpoint.source import LazyArray
from jaxscale.checkpoint.universal import Shard, merge
from jaxscale.checkpoint.views import Permuted
from jaxscale.checkpoint.zipped import stored_members
from jaxscale.types import InputError

RULES = "rules.toml"
ONLY_RANK = "all"
RANKS = re.compile(r"[a-z_]+=\d+(,[a-z_]+=\d+)*")
WITHOUT_RULES = (Rule(match="(?s).*"),)
NO_NUMBERS = "OSUmM"  # objects, texts and times
# NumPy has no name for bfloat16 and writes it as two bytes without a type.
UNTYPED = {np.dtype("V2"): np.dtype(ml_dtypes.bfloat16)}


def is_rank_folder(folder: Path) -> bool:
    """Whether a folder holds per-rank files."""
    return any(_is_rank(path) for path in folder.glob("*.npz"))


class RankFiles:
    """A folder of per-rank `.npz` files; a `Source`.

    Args:
        folder: with the files.
        rules: in place of those in the folder.
    Raises:
        InputError: a file is damaged or holds Python objects, or the rules do not fit.
    """

    def __init__(self, folder: Path, rules: tuple[Rule, ...] | None = None):
        self._folder = folder
        if rules is None:
            own = folder / RULES
            rules = load_rules(own) if own.exists() else WITHOUT_RULES
        self._rules = rules

    def leaves(self) -> Mapping[str, Merged]:
        """Each parameter by its path; nothing of them is read."""
        return merge(self._shards(), self._rules)

    def _shards(self) -> Iterator[Shard]:
        for path in sorted(self._folder.glob("*.npz")):
            if not _is_rank(path):
                expected = "a name of axes and ranks, such as tensor=0,pipeline=1.npz"
                raise InputError("checkpoint", str(path), expected)
            ranks = {}
            if path.stem != ONLY_RANK:
                for item in path.stem.split(","):
                    axis, _, number = item.partition("=")
                    if axis in ranks:
                        raise InputError("checkpoint", str(path), f"one rank of {axis}")
                    ranks[axis] = int(number)
            for name, array in npz_arrays(path).items():
                yield Shard(name, ranks, array)


def npz_arrays(path: Path) -> dict[str, LazyArray]:
    """The arrays of an uncompressed `.npz` file by name.

    Raises:
        InputError: the file is damaged or compressed, or holds Python objects.
    """
    arrays: dict[str, LazyArray] = {}
    for member, place in stored_members(path).items():
        name = member.removesuffix(".npy")
        if name in arrays:
            raise InputError(str(path), name, "one array of that name")
        with path.open("rb") as file:
            file.seek(place.offset)
            try:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    read = np.lib.format.read_array_header_2_0
                shape, is_column_major, dtype = read(file)
            except (ValueError, tokenize.TokenError) as error:
                raise InputError(str(path), name, f"an array ({error})") from error
            begin = file.tell()
        dtype = UNTYPED.get(dtype, dtype)
        is_untyped = dtype.kind == "V" and dtype not in UNTYPED.values()
        if dtype.kind in NO_NUMBERS or is_untyped or dtype != dtype.newbyteorder("<"):
            raise InputError(f"{path}: {name}", str(dtype), "an array of little-endian numbers")
        if is_column_major and len(shape) > 1:
            backwards = tuple(reversed(range(len(shape))))
            stored = FileArray(path, begin, shape[::-1], dtype)
            arrays[name] = Permuted(stored, backwards)
        else:
            arrays[name] = FileArray(path, begin, shape, dtype)
    return arrays


def write_npz(leaves: Mapping[str, LazyArray], path: Path, *, piece_bytes: int) -> None:
    """Writes arrays as one uncompressed `.npz` file, of which NumPy reads any part.

    Args:
        leaves: arrays by name.
        path: of the file, which must not exist; it is there whole or not at all.
        piece_bytes: of an array in memory at once.
    """
    if path.exists():
        raise InputError("destination", str(path), "a file that does not exist yet")
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in leaves.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {
                    "descr": np.lib.format.dtype_to_descr(array.dtype),
                    "fortran_order": False,
                    "shape": tuple(array.shape),
                }
                np.lib.format.write_array_header_1_0(member, header)
                write_rows(member, array, piece_bytes)
    unfinished.rename(path)


def _is_rank(path: Path) -> bool:
    return path.stem == ONLY_RANK or RANKS.fullmatch(path.stem) is not None
