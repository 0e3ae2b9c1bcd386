"""Where text comes from: each source yields its documents in the same order every time."""

import contextlib
import dataclasses
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxscale.data.files import find_files, read_bytes, read_lines, stamps
from jaxscale.data.libraries import imported, library_errors
from jaxscale.types import InputError, check_types


class Document(NamedTuple):
    """A text and the key that names it within its source, the same on every machine."""

    key: str
    text: str


class ChatDocument(NamedTuple):
    """A document in whose text special tokens that it spells are tokens, as in a chat's.

    Args:
        key: as of a `Document`.
        text: what is read.
        trained: first and last character, the latter excluded, of each span that is trained.
        second: of a pair of answers, the character with which the rejected one's text begins.
    """

    key: str
    text: str
    trained: tuple[tuple[int, int], ...]
    second: int | None = None


def check_characters(parameter: str, given: str, text: str) -> None:
    """Checks that a text has no half of a surrogate pair.

    JSON can spell one, and a byte of the command line that is no UTF-8 becomes one.

    Raises:
        InputError: it has one; names `parameter` and `given`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        expected = f"text of whole characters ({error.reason})"
        raise InputError(parameter, given, expected) from error


def read_documents(source: "Source") -> Iterator[Document | ChatDocument]:
    """The documents of a source that have text, without the byte order mark that some begin with.

    Raises:
        InputError: as the source does, or a text has half a character.
    """
    for document in source.documents():
        is_chat = isinstance(document, ChatDocument)  # whose spans count from its beginning
        text = document.text if is_chat else document.text.removeprefix("\ufeff")
        check_characters("sources", document.key, text)
        if text:
            yield document if is_chat else Document(document.key, text)


@runtime_checkable
class Source(Protocol):
    """A frozen dataclass that names a collection of documents."""

    def documents(self) -> Iterator[Document | ChatDocument]:
        """The documents, all of one kind and in the same order every time."""
        ...

    def version(self) -> list[Any]:
        """JSON-able facts that change when the documents do."""
        ...


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Text files, one document each.

    A document's key is its file's path relative to the folder that was given, and the documents
    come in the order of their keys.

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
        """A document a file, in the order of their keys.

        Raises:
            InputError: a file cannot be read, or is no text in UTF-8.
        """
        for key, path in self._files():
            try:
                text = read_bytes(path).decode()
            except UnicodeDecodeError as error:
                expected = f"text in UTF-8 ({error.reason})"
                raise InputError("TextSource.paths", str(path), expected) from error
            yield Document(key, text)

    def version(self) -> list[Any]:
        """The files' stamps, see `data.files.stamps`."""
        return stamps(self._files())

    def _files(self) -> list[tuple[str, Path]]:
        return find_files("TextSource.paths", self.paths, self.patterns, self.excluded)


@dataclasses.dataclass(frozen=True)
class StandardLibrary:
    """The Python files of the running interpreter's standard library.

    They are code and prose that every machine has.

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
        """A document a file, but for those that are not in UTF-8."""
        for key, path in self._files():
            try:
                text = read_bytes(path).decode()
            except UnicodeDecodeError:
                continue  # a few files are of another encoding on purpose
            yield Document(key, text)

    def version(self) -> list[Any]:
        """The files' stamps, see `data.files.stamps`."""
        return stamps(self._files())

    def _files(self) -> list[tuple[str, Path]]:
        folder = sysconfig.get_path("stdlib")
        return find_files("StandardLibrary", (folder,), ("*.py",), self.excluded)


@dataclasses.dataclass(frozen=True)
class JsonLinesSource:
    """One JSON object per line; gzip and zstd are recognised by their first bytes.

    Args:
        paths: files and folders.
        patterns: which files of a folder count.
        text_field: the field that holds the text.
        key_field: the field that holds the document's key, another one in each row; without one the
            key is `file:line`.
    """

    paths: tuple[str, ...]
    patterns: tuple[str, ...] = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst")
    text_field: str = "text"
    key_field: str | None = None

    def __post_init__(self):
        check_types(self)

    def documents(self) -> Iterator[Document]:
        """A document a line, in the order of the files.

        Raises:
            InputError: a file cannot be read, or a line is no object with the fields; names it.
        """
        for name, path in self._files():
            lines = read_lines("JsonLinesSource.paths", path)
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                label = f"{path}:{number}"
                yield _document(
                    _json_object(label, line),
                    label=label,
                    text_field=self.text_field,
                    key_field=self.key_field,
                    default_key=f"{name}:{number}",
                )

    def version(self) -> list[Any]:
        """The files' stamps, see `data.files.stamps`."""
        return stamps(self._files())

    def _files(self) -> list[tuple[str, Path]]:
        return find_files("JsonLinesSource.paths", self.paths, self.patterns)


@dataclasses.dataclass(frozen=True)
class ParquetSource:
    """One document per row of Parquet files; needs the extra `data`.

    Args:
        paths: files and folders.
        patterns: which files of a folder count.
        text_column: the column that holds the text.
        key_column: the column that holds the document's key, another one in each row; without one
            the key is `file:row`.
    """

    paths: tuple[str, ...]
    patterns: tuple[str, ...] = ("*.parquet",)
    text_column: str = "text"
    key_column: str | None = None

    def __post_init__(self):
        check_types(self)

    def documents(self) -> Iterator[Document]:
        """A document a row, in the order of the files.

        Raises:
            InputError: pyarrow is missing, a file cannot be read, or it has no such columns.
        """
        for name, path in self._files():
            for number, row in enumerate(self._rows(path)):
                yield _document(
                    row,
                    label=f"{path}:{number}",
                    text_field=self.text_column,
                    key_field=self.key_column,
                    default_key=f"{name}:{number}",
                )

    def version(self) -> list[Any]:
        """The files' stamps, see `data.files.stamps`."""
        return stamps(self._files())

    def _files(self) -> list[tuple[str, Path]]:
        return find_files("ParquetSource.paths", self.paths, self.patterns)

    def _rows(self, path: Path) -> Iterator[dict[str, Any]]:
        parquet = imported("pyarrow.parquet", "ParquetSource")
        columns = _columns(self.text_column, self.key_column)
        expected = "a Parquet file that is whole"
        with (
            library_errors("ParquetSource.paths", str(path), expected),
            parquet.ParquetFile(path) as file,
        ):
            _check_columns(f"ParquetSource: {path}", columns, file.schema_arrow.names)
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()


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
        key_column: the column that holds the document's key, another one in each row; without one
            the key is the row's number.
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
            given = (self.directory, self.name)
            raise InputError("HuggingFaceSource", given, "exactly one of directory and name")

    def documents(self) -> Iterator[Document]:
        """A document a row.

        Raises:
            InputError: the package is missing, or the dataset, or it has no such columns.
        """
        for number, row in enumerate(self._rows()):
            yield _document(
                row,
                label=f"HuggingFaceSource row {number}",
                text_field=self.text_column,
                key_field=self.key_column,
                default_key=str(number),
            )

    def version(self) -> list[Any]:
        """The fingerprint that the package gives the dataset."""
        with self._errors():
            return [self._load()._fingerprint]

    def _rows(self) -> Iterator[dict[str, Any]]:
        columns = _columns(self.text_column, self.key_column)
        with self._errors():
            dataset = self._load()
            _check_columns("HuggingFaceSource", columns, dataset.column_names)
            yield from dataset.select_columns(columns)

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        given = self.directory if self.name is None else self.name
        return library_errors("HuggingFaceSource", given, "a dataset that can be read")

    def _load(self) -> Any:
        datasets = imported("datasets", "HuggingFaceSource")
        if self.directory is None:
            return datasets.load_dataset(
                self.name,
                self.configuration,
                revision=self.revision,
                split=self.split,
            )
        found = datasets.load_from_disk(str(Path(self.directory).expanduser()))
        if not isinstance(found, datasets.DatasetDict):
            return found
        if self.split not in found:
            expected = f"one of {', '.join(found)}"
            raise InputError("HuggingFaceSource.split", self.split, expected)
        return found[self.split]


def _columns(text_column: str, key_column: str | None) -> list[str]:
    return [text_column] if key_column is None else [text_column, key_column]


def _check_columns(label: str, columns: list[str], found: list[str]) -> None:
    for column in columns:
        if column not in found:
            raise InputError(label, found, f"a column {column!r}")


def _json_object(label: str, line: bytes) -> dict[str, Any]:
    beginning = line[:80].decode(errors="replace")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        expected = f"one JSON object per line ({error})"
        raise InputError(label, beginning, expected) from error
    if not isinstance(row, dict):
        raise InputError(label, beginning, "a JSON object")
    return row


def _document(
    row: dict[str, Any],
    *,
    label: str,
    text_field: str,
    key_field: str | None,
    default_key: str,
) -> Document:
    """The document that a row holds.

    Args:
        row: values by field.
        label: names the row in errors.
        text_field: the field that holds the text.
        key_field: the field that holds the key; None: the key is `default_key`.
        default_key: the key of a row that has no field for it.
    """
    for field in (text_field, key_field):
        if field is not None and field not in row:
            raise InputError(label, sorted(row), f"a field {field!r}")
    text = row[text_field]
    if not isinstance(text, str):
        raise InputError(f"{label}: {text_field}", text, "a string")
    key = default_key if key_field is None else str(row[key_field])
    return Document(key, text)
