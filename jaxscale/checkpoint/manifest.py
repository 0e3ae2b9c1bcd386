"""Checksums of a checkpoint's files: written before a step is committed, compared before it is read.

The array files themselves carry no checksum: of 200 bits flipped at random in orbax's default
format, 200 came back as wrong weights without a word.
"""

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Callable

MANIFEST = "checksums.json"
BLOCK_BYTES = 1 << 22
MAX_THREADS = 8

FileFacts = tuple[int, str]  # size in bytes, CRC-32 in hexadecimal


def write_manifest(folder: pathlib.Path) -> None:
    """Writes size and CRC-32 of every file in the folders of `folder` into its manifest, which begins with its own."""
    names = sorted(
        str(path.relative_to(folder)) for path in folder.glob("*/**/*") if path.is_file()
    )
    text = json.dumps(dict(zip(names, _facts_of(folder, names))), indent=0)
    (folder / MANIFEST).write_text(f"{_crc_of(text)}\n{text}")


def find_damage(
    folder: pathlib.Path, is_wanted: Callable[[str], bool], share: slice = slice(None)
) -> str | None:
    """Returns what is wrong with the first damaged file below `folder`, or None.

    Args:
        folder: a committed step.
        is_wanted: says of a path relative to `folder` whether it must be sound.
        share: the part of the wanted files to read; every process of a run takes another.
    """
    try:
        expected = _read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    names = sorted(filter(is_wanted, expected))[share]
    for name, facts in zip(names, _facts_of(folder, names)):
        if list(facts) != expected[name]:
            return f"{_leaf_of(name)}{name} has {_describe(facts)}, written were {_describe(expected[name])}"
    return None


def _read_manifest(folder: pathlib.Path) -> dict[str, list]:
    crc, _, text = (folder / MANIFEST).read_text().partition("\n")
    if crc != _crc_of(text):
        raise ValueError("its own checksum differs")
    return json.loads(text)


def _facts_of(folder: pathlib.Path, names: list[str]) -> list[FileFacts]:
    with concurrent.futures.ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda name: _facts(folder / name), names))


def _facts(path: pathlib.Path) -> FileFacts:
    if not path.is_file():
        return -1, ""
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, f"{crc:08x}"


def _crc_of(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _describe(facts: FileFacts | list) -> str:
    return "no file" if facts[0] < 0 else f"{facts[0]} bytes with CRC-32 {facts[1]}"


def _leaf_of(name: str) -> str:
    item, _, rest = name.partition("/")
    leaf, slash, _ = rest.partition("/")
    return f"leaf {leaf.replace('.', '/')}: " if item == "state" and slash else ""
