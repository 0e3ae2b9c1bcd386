"""The files of a source: which they are, their content, and whether they have changed."""

import collections
import contextlib
import functools
import gzip
import logging
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from jaxscale.types import InputError

logger = logging.getLogger(__name__)

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Of frames that hold no text, with which parallel compressors begin a file.
SKIPPABLE_MAGIC = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
MAX_WINDOW_BYTES = 1 << 31  # the most that zstd has, `--long=31`
CHUNK_BYTES = 1 << 20


def find_files(
    parameter: str,
    paths: tuple[str, ...],
    patterns: tuple[str, ...],
    excluded: tuple[str, ...] = (),
) -> list[tuple[str, Path]]:
    """Finds the files that a source reads.

    Args:
        parameter: name of the field that gives `paths`, for errors.
        paths: files and folders; folders are searched with all they contain.
        patterns: which files of a folder count, as globs of the file name.
        excluded: names of folders that are not entered, as globs.

    Returns:
        Key and path of each file, in the order of the keys. The key is the path relative to the
        folder that was given, or the name of a file that was given; where several files have one
        key, "#2", "#3" and so on are added to those of later folders. A file that is reached twice,
        such as by a link or under two of the paths, comes once.

    Raises:
        InputError: a path does not exist, a folder cannot be read, no file matches, or what matches
            is no regular file: to read a pipe would wait for ever.
    """
    found = []
    for given in paths:
        path = Path(given).expanduser()
        with _readable(path, "a file or folder"):  # its name may be too long to be one
            is_there, is_folder = path.exists(), path.is_dir()
        if not is_there:
            raise InputError(parameter, str(path), "a file or folder that exists")
        if is_folder:
            found += _search(path, patterns, excluded)
        else:
            found.append((path.name, path))
    if not found:
        expected = f"at least one file that matches {', '.join(patterns)}"
        raise InputError(parameter, paths, expected)
    found.sort(key=lambda file: file[0])  # stable: where keys are equal, in the order of `paths`
    return _with_own_keys(_without_repeats(parameter, found))


def stamps(files: list[tuple[str, Path]]) -> list[Any]:
    """Key, size and modification time of each file: an edited corpus has other stamps.

    Raises:
        InputError: a file cannot be read.
    """
    return [_stamp(key, path) for key, path in files]


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        InputError: the file cannot be read.
    """
    with _readable(path, "a file"):
        return path.read_bytes()


def read_lines(parameter: str, path: Path) -> Iterator[bytes]:
    """The lines of a file; gzip and zstd are recognised by their first bytes.

    Args:
        parameter: name of the field that gives the path, for errors.
        path: the file.

    Raises:
        InputError: the file is compressed and damaged, cut short or needs a dictionary.
    """
    # Of a line whose end has not come. They are joined once: to join each with those before it
    # would take minutes for a line of some hundred MiB.
    parts: list[bytes] = []
    try:
        with path.open("rb") as file:
            for chunk in _decompressed(file):
                end, *lines = chunk.split(b"\n")
                parts.append(end)
                if lines:
                    yield b"".join(parts)
                    yield from lines[:-1]
                    parts = lines[-1:]
    except EOFError as error:
        expected = f"a whole compressed file ({error})"
        raise InputError(parameter, str(path), expected) from error
    except (zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        expected = f"a compressed file that can be read ({error})"
        raise InputError(parameter, str(path), expected) from error
    yield b"".join(parts)


def _without_repeats(parameter: str, files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The files without those that are the same on disk as one before them."""
    seen: dict[tuple[int, int], tuple[str, Path]] = {}
    for key, path in files:
        with _readable(path, "a file"):  # a link to nothing, for example, is not
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(parameter, str(path), "a regular file, no pipe, socket or device")
        seen.setdefault((status.st_dev, status.st_ino), (key, path))
    kept = list(seen.values())
    if num_repeats := len(files) - len(kept):
        logger.warning(
            "%s: %d of %d files are others again, by a link or under two paths; each is read once",
            parameter,
            num_repeats,
            len(files),
        )
    return kept


def _with_own_keys(files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    times: collections.Counter[str] = collections.Counter()
    named = []
    for key, path in files:
        times[key] += 1
        own_key = key if times[key] == 1 else f"{key}#{times[key]}"
        named.append((own_key, path))
    return named


def _search(
    folder: Path,
    patterns: tuple[str, ...],
    excluded: tuple[str, ...],
    parents: frozenset[Path] = frozenset(),
) -> Iterator[tuple[str, Path]]:
    """Keys and paths of the files in a folder.

    Links are followed. A link back to one of `parents` is not: the search would never end.
    """
    resolved = folder.resolve()
    if resolved in parents:
        return
    for path in _entries(folder):
        if not path.is_dir():
            if _matches(path.name, patterns):
                yield path.name, path
        elif not _matches(path.name, excluded):
            for key, file in _search(path, patterns, excluded, parents | {resolved}):
                yield f"{path.name}/{key}", file


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _entries(folder: Path) -> list[Path]:
    with _readable(folder, "a folder"):
        return list(folder.iterdir())


def _stamp(key: str, path: Path) -> list[Any]:
    with _readable(path, "a file"):  # a link to nothing, for example, is not
        status = path.stat()
    return [key, status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Turns the file system's refusal to read `path` into InputError."""
    try:
        yield
    except OSError as error:
        expected = f"{kind} that can be read ({error.strerror})"
        raise InputError("paths", str(path), expected) from error


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    magic = file.read(4)
    file.seek(0)
    if magic == ZSTD_MAGIC or SKIPPABLE_MAGIC.match(magic):
        return _zstd_chunks(file)
    if magic.startswith(GZIP_MAGIC):
        return _chunks(gzip.open(file))
    return _chunks(file)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    read_chunk = functools.partial(file.read, CHUNK_BYTES)
    return iter(read_chunk, b"")


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The content of one zstd frame after the other.

    The frames are read one by one because zstandard's own reader takes a file that was cut short
    for a whole one.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    frame = None
    for chunk in _chunks(file):
        while chunk:
            if frame is None or frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("the last frame has no end")
