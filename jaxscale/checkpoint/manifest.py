"""Checksums of a checkpoint's files: written before a step is committed, compared on reading.

The array files themselves carry no checksum: of 200 bits flipped at random in orbax's default
format, 200 came back as wrong weights without a word.
"""

import concurrent.futures
import functools
import json
import operator
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

MANIFEST = "checksums.json"
VERSION = "2"  # 1 had none
BLOCK_BYTES = 1 << 22
MAX_THREADS = 8
PARAMS_FILES = ("state/_", "state/array_metadatas/", "state/params.")
AVERAGES_FILES = ("state/opt_state.2.average.", "state/opt_state.2.count/")

Folder = Any  # a pathlib.Path or a `remote.RemotePath`
FileFacts = tuple[int, str]  # size in bytes, or -1 for no file; CRC-32 in hexadecimal


def write_manifest(folder: pathlib.Path) -> None:
    """Writes size and CRC-32 of every file in the folders of `folder` into its manifest.

    The manifest begins with its own checksum and version.
    """
    names = []
    for path in folder.glob("*/**/*"):
        if path.is_file():
            names.append(str(path.relative_to(folder)))
    names.sort()
    facts = _facts_of(folder, names)
    text = json.dumps(dict(zip(names, facts)), indent=0)
    (folder / MANIFEST).write_text(f"{_crc_of(text)} {VERSION}\n{text}")


def find_damage(
    folder: Folder, is_wanted: Callable[[str], bool], share: slice = slice(None)
) -> str | None:
    """Returns what is wrong with the first damaged file below `folder`, or None.

    Args:
        folder: a committed step.
        is_wanted: says of a path relative to `folder` whether it must be sound.
        share: the part of the wanted files to read; every process of a run takes another.
    """
    try:
        manifest = _read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    wanted = sorted(filter(is_wanted, manifest))
    names = wanted[share]
    for name, found in zip(names, _facts_of(folder, names)):
        written = tuple(manifest[name])
        if found != written:
            leaf = _leaf_of(name)
            return f"{leaf}{name} has {_describe(found)}, written were {_describe(written)}"
    return None


def is_for_params(name: str) -> bool:
    """Whether a restore of the parameters alone reads the file `name` of a step."""
    if name.endswith("/.zarray"):  # the shapes of all leaves are read
        return True
    return name.startswith(PARAMS_FILES)


def is_for_averages(name: str) -> bool:
    """Whether one of the parameters, with averages in the place of some, does."""
    return is_for_params(name) or name.startswith(AVERAGES_FILES)


def _read_manifest(folder: Folder) -> dict[str, list]:
    content = (folder / MANIFEST).read_text()
    first, _, text = content.partition("\n")
    crc, _, version = first.partition(" ")
    if version not in ("", VERSION):
        raise ValueError(f"version {version}, of a newer jaxscale")
    if crc != _crc_of(text):
        raise ValueError("its own checksum differs")
    return json.loads(text)


def _facts_of(folder: Folder, names: list[str]) -> list[FileFacts]:
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    paths = [_within(folder, name) for name in names]
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(_facts, paths))


def _within(folder: Folder, name: str) -> Folder:
    return functools.reduce(operator.truediv, name.split("/"), folder)


def _facts(path: Folder) -> FileFacts:
    if not path.is_file():
        return -1, ""
    size = 0
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, f"{crc:08x}"


def _crc_of(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _describe(facts: FileFacts) -> str:
    size, crc = facts
    return "no file" if size < 0 else f"{size} bytes with CRC-32 {crc}"


def _leaf_of(name: str) -> str:
    """The leaf that a file of a step belongs to, as the beginning of a message."""
    item, _, rest = name.partition("/")
    folder, slash, _ = rest.partition("/")
    if item != "state" or not slash:
        return ""
    leaf = folder.replace(".", "/")
    return f"leaf {leaf}: "
