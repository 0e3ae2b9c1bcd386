"""Where text comes from: each source yields its documents in the same order every time."""

import dataclasses
import functools
import gzip
import importlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

import zstandard

from jaxscale.types import InputError, check_types

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
CHUNK_BYTES = 1 << 20


class Document(NamedTuple):
    """A text and the key that names it within its source, whatever the machine."""

    key: str
    text: str


def num_bytes(document: Document) -> int:
    """Bytes of the text in UTF-8.

    Raises:
        InputError: the text has half a character, as JSON can spell one.
    """
    try:
        return len(document.text.encode())
    except UnicodeEncodeError as error:
        raise InputError(
            "sources", document.key, f"text of whole characters ({error.reason})"
        ) from error


@runtime_checkable
class Source(Protocol):
    """A frozen dataclass that names a collection of documents."""

    def documents(self) -> Iterator[Document]:
        """The documents, in the same order every time."""
        ...

    def version(self) -> list[Any]:
        """JSON-able facts that change when the documents do."""
        ...


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Text files, one document each, in the order of their keys: the path relative to the folder that was given.

    Args:
        paths: files and folders; folders are searched with all they contain.
        patterns: which files of a folder count, as globs of the file name.
        excluded: names of folders that are not entered, as globs.
    """

    paths: tuple[str, ...]
    patterns: tuple[str, ...] = ("*.txt",)
    excluded: tuple[str, ...] = ()

    def __post_init__(self):
        check_types(self)

    def documents(self) -> Iterator[Document]:
        for key, path in self._files():
            try:
                yield Document(key, _read(path).decode())
            except UnicodeDecodeError as error:
                raise InputError(
                    "TextSource.paths", str(path), f"text in UTF-8 ({error.reason})"
                ) from error

    def version(self) -> list[Any]:
        return _stamps(self._files())

    def _files(self) -> list[tuple[str, Path]]:
        return _files("TextSource.paths", self.paths, self.patterns, self.excluded)


@dataclasses.dataclass(frozen=True)
class StandardLibrary:
    """The Python files of the running interpreter's standard library: code and prose on every machine.

    Args:
        excluded: names of folders that are not entered. Some systems ship Python without its tests,
            so that leaving them out gives about the same corpus everywhere.
    """

    excluded: tuple[str, ...] = (
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
    )

    def __post_init__(self):
        check_types(self)

    def documents(self) -> Iterator[Document]:
        """The files that are UTF-8; a few are of another encoding on purpose."""
        for key, path in self._files():
            try:
                yield Document(key, _read(path).decode())
            except UnicodeDecodeError:
                continue

    def version(self) -> list[Any]:
        return _stamps(self._files())

    def _files(self) -> list[tuple[str, Path]]:
        return _files("StandardLibrary", (sysconfig.get_path("stdlib"),), ("*.py",), self.excluded)


@dataclasses.dataclass(frozen=True)
class JsonLinesSource:
    """One JSON object per line; gzip and zstd are recognised by their first bytes.

    Args:
        paths: files and folders.
        patterns: which files of a folder count.
        text_field: the field that holds the text.
        key_field: the field that holds the document's key; without one the key is `file:line`.
    """

    paths: tuple[str, ...]
    patterns: tuple[str, ...] = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst")
    text_field: str = "text"
    key_field: str | None = None

    def __post_init__(self):
        check_types(self)

    def documents(self) -> Iterator[Document]:
        for name, path in self._files():
            for number, line in enumerate(_lines(path), 1):
                if line.strip():
                    label = f"{path}:{number}"
                    yield _document(
                        label,
                        _json_object(label, line),
                        self.text_field,
                        self.key_field,
                        f"{name}:{number}",
                    )

    def version(self) -> list[Any]:
        return _stamps(self._files())

    def _files(self) -> list[tuple[str, Path]]:
        return _files("JsonLinesSource.paths", self.paths, self.patterns)


@dataclasses.dataclass(frozen=True)
class ParquetSource:
    """One document per row of Parquet files; needs the extra `data`. Args as in JsonLinesSource, columns for fields."""

    paths: tuple[str, ...]
    patterns: tuple[str, ...] = ("*.parquet",)
    text_column: str = "text"
    key_column: str | None = None

    def __post_init__(self):
        check_types(self)

    def documents(self) -> Iterator[Document]:
        pyarrow = _import("pyarrow", "ParquetSource")
        parquet = _import("pyarrow.parquet", "ParquetSource")
        columns = [self.text_column] + [self.key_column] * (self.key_column is not None)
        for name, path in self._files():
            try:
                file = parquet.ParquetFile(path)
            except pyarrow.ArrowInvalid as error:
                raise InputError(
                    "ParquetSource.paths", str(path), f"a Parquet file ({error})"
                ) from error
            with file:
                _check_columns(f"ParquetSource: {path}", columns, file.schema_arrow.names)
                rows = (
                    row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist()
                )
                for number, row in enumerate(rows):
                    label = f"{name}:{number}"
                    yield _document(
                        f"{path}:{number}", row, self.text_column, self.key_column, label
                    )

    def version(self) -> list[Any]:
        return _stamps(self._files())

    def _files(self) -> list[tuple[str, Path]]:
        return _files("ParquetSource.paths", self.paths, self.patterns)


@dataclasses.dataclass(frozen=True)
class HuggingFaceSource:
    """One document per row of a Hugging Face dataset; needs the extra `data`.

    Args:
        directory: where `save_to_disk` wrote the dataset; or
        name: what `load_dataset` gets: a dataset on the hub, or a local folder of data files.
        configuration: the dataset's configuration, for `name`.
        revision: commit or tag on the hub, for `name`; without one the newest at the time of the
            call.
        split: the part of the dataset, where it has parts.
        text_column: the column that holds the text.
        key_column: the column that holds the document's key; without one the key is the row's
            number.
    """

    directory: str | None = None
    name: str | None = None
    configuration: str | None = None
    revision: str | None = None
    split: str = "train"
    text_column: str = "text"
    key_column: str | None = None

    def __post_init__(self):
        check_types(self)
        if (self.directory is None) == (self.name is None):
            raise InputError(
                "HuggingFaceSource",
                (self.directory, self.name),
                "exactly one of directory and name",
            )

    def documents(self) -> Iterator[Document]:
        columns = [self.text_column] + [self.key_column] * (self.key_column is not None)
        dataset = self._load()
        _check_columns("HuggingFaceSource", columns, dataset.column_names)
        for number, row in enumerate(dataset.select_columns(columns)):
            label = f"HuggingFaceSource row {number}"
            yield _document(label, row, self.text_column, self.key_column, str(number))

    def version(self) -> list[Any]:
        return [self._load()._fingerprint]

    def _load(self) -> Any:
        datasets = _import("datasets", "HuggingFaceSource")
        try:
            if self.directory is None:
                return datasets.load_dataset(
                    self.name, self.configuration, revision=self.revision, split=self.split
                )
            found = datasets.load_from_disk(str(Path(self.directory).expanduser()))
        except (FileNotFoundError, ConnectionError, ValueError) as error:
            raise InputError(
                "HuggingFaceSource", self.directory or self.name, f"a dataset ({error})"
            ) from error
        if not isinstance(found, datasets.DatasetDict):
            return found
        if self.split not in found:
            raise InputError("HuggingFaceSource.split", self.split, f"one of {', '.join(found)}")
        return found[self.split]


def _files(
    parameter: str,
    paths: tuple[str, ...],
    patterns: tuple[str, ...],
    excluded: tuple[str, ...] = (),
) -> list[tuple[str, Path]]:
    """Keys and paths of the files that `paths` name, folders searched, in the order of the keys."""
    found = []
    for path in (Path(each).expanduser() for each in paths):
        if path.is_dir():
            found += _search(path, patterns, excluded)
        elif path.exists():
            found.append((path.name, path))
        else:
            raise InputError(parameter, str(path), "a file or folder that exists")
    if not found:
        raise InputError(parameter, paths, f"at least one file that matches {', '.join(patterns)}")
    return sorted(found)


def _search(
    folder: Path,
    patterns: tuple[str, ...],
    excluded: tuple[str, ...],
    entered: frozenset[Path] = frozenset(),
) -> Iterator[tuple[str, Path]]:
    """Keys and paths of the files in a folder; links are followed, but not back into a folder of `entered`."""
    if folder.resolve() in entered:
        return
    for path in _entries(folder):
        if path.is_dir():
            if not any(fnmatch(path.name, pattern) for pattern in excluded):
                found = _search(path, patterns, excluded, entered | {folder.resolve()})
                yield from ((f"{path.name}/{key}", file) for key, file in found)
        elif any(fnmatch(path.name, pattern) for pattern in patterns):
            yield path.name, path


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(
            "paths", str(folder), f"a folder that can be read ({error.strerror})"
        ) from error


def _stamps(files: list[tuple[str, Path]]) -> list[Any]:
    """Key, size and time of change of each file: what tells an edited corpus from the one that was tokenised."""
    stats = [(key, _stat(path)) for key, path in files]
    return [[key, stat.st_size, stat.st_mtime_ns] for key, stat in stats]


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:  # such as a link to nothing
        raise InputError(
            "paths", str(path), f"a file that can be read ({error.strerror})"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            "paths", str(path), f"a file that can be read ({error.strerror})"
        ) from error


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    try:
        with path.open("rb") as file:
            for chunk in _decompressed(file):
                *whole, rest = (rest + chunk).split(b"\n")
                yield from whole
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise InputError(
            "JsonLinesSource.paths", str(path), f"a whole compressed file ({error})"
        ) from error
    yield rest


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    magic = file.read(4)
    file.seek(0)
    if magic == ZSTD_MAGIC:
        return _zstd_chunks(file)
    return _chunks(gzip.open(file) if magic.startswith(GZIP_MAGIC) else file)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    return iter(functools.partial(file.read, CHUNK_BYTES), b"")


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The content of one frame after the other; zstandard's own reader takes a file cut short for a whole one."""
    frame = None
    for chunk in _chunks(file):
        while chunk:
            if frame is None or frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("the last frame has no end")


def _json_object(label: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(label, _shortened(line), f"one JSON object per line ({error})") from error
    if not isinstance(row, dict):
        raise InputError(label, _shortened(line), "a JSON object")
    return row


def _document(
    label: str, row: dict[str, Any], text_field: str, key_field: str | None, key: str
) -> Document:
    """The document that a row holds; `label` names the row in errors, `key` serves without a `key_field`."""
    for field in (text_field, key_field):
        if field is not None and field not in row:
            raise InputError(label, sorted(row), f"a field {field!r}")
    text = row[text_field]
    if not isinstance(text, str):
        raise InputError(f"{label}: {text_field}", text, "a string")
    return Document(key if key_field is None else str(row[key_field]), text)


def _check_columns(label: str, columns: list[str], found: list[str]) -> None:
    for column in columns:
        if column not in found:
            raise InputError(label, found, f"a column {column!r}")


def _shortened(line: bytes) -> str:
    return line[:80].decode(errors="replace")


def _import(module: str, needed_by: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            needed_by, f"no {module}", "the extra: pip install 'jaxscale[data]'"
        ) from error
