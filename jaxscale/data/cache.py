"""The tokenised corpus on disk: built once for a source and a tokenizer, then memory-mapped."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxscale.data.sources import Document, Source, num_bytes
from jaxscale.data.split import hash_key
from jaxscale.data.tokenizer import Tokenizer
from jaxscale.types import InputError

FORMAT = 1
MANIFEST = "manifest.json"
CHARACTERS_PER_ENCODE = 1 << 22


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """The documents of one source as tokens, each followed by the end-of-document token.

    Args:
        tokens: uint16 or uint32 [num_tokens], memory-mapped.
        offsets: int64 [num_documents + 1]; document d is tokens[offsets[d]:offsets[d + 1]].
        num_bytes: int64 [num_documents], UTF-8 bytes of the text.
        key_hashes: uint64 [num_documents].
        fingerprint: names source, tokenizer and the state of the source's files on this machine.
        content: names the tokens, the documents' ends and their keys; the same wherever they were
            read.
        tokenizer: the tokenizer's fingerprint.
        directory: where the files are.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray
    key_hashes: np.ndarray
    fingerprint: str
    content: str
    tokenizer: str
    directory: Path

    def keys(self) -> list[str]:
        """The documents' keys, in order."""
        return [
            json.loads(line) for line in (self.directory / "keys.jsonl").read_text().splitlines()
        ]


def open_cache(source: Source, tokenizer: Tokenizer, directory: str | Path) -> TokenCache:
    """Opens the cache of `source` under `directory`, after building it if it is not there.

    It is built aside and renamed, so that it is there whole or not at all, whoever else builds it
    or dies building it.

    Raises:
        InputError: the source has no text, `directory` cannot be written, or the cache there is
            damaged.
    """
    name = fingerprint(source, tokenizer)
    root = Path(directory).expanduser()
    if not (root / name).is_dir():
        _build(source, tokenizer, root, name)
    return _open(root / name, tokenizer)


def fingerprint(source: Source, tokenizer: Tokenizer) -> str:
    """Names what a cache holds: 32 hexadecimal digits of the source, its version and the tokenizer."""
    facts = [
        FORMAT,
        type(source).__name__,
        dataclasses.asdict(source),
        source.version(),
        tokenizer.fingerprint,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _build(source: Source, tokenizer: Tokenizer, root: Path, name: str) -> None:
    with _lock(root, name):
        if (root / name).is_dir():
            return
        # The lock may not reach other hosts: their folders are left alone, and the rename decides.
        prefix = f".{name}.{socket.gethostname()}."
        for abandoned in root.glob(f"{prefix}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        with _refusals_named(root):
            folder = root / f"{prefix}{os.getpid()}"
            folder.mkdir()
        try:
            _write(source, tokenizer, folder)
            _publish(folder, root / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(root: Path, name: str) -> Iterator[None]:
    """Holds the right to build this cache among the processes of a host; the system frees it when its holder dies."""
    with _refusals_named(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{name}.lock").open("wb")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _publish(folder: Path, target: Path) -> None:
    """Renames a finished cache into place; where another host was faster, its cache stands: it holds the same."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    lengths, sizes, hashes = [], [], []
    content = hashlib.sha256()
    with _writer(folder / "tokens.bin") as tokens, _writer(folder / "keys.jsonl") as keys:
        for documents in _groups(source.documents()):
            sizes += [num_bytes(document) for document in documents]
            encoded = tokenizer.encode_batch([document.text for document in documents])
            ended = [np.append(ids, tokenizer.eos_id).astype(dtype) for ids in encoded]
            lengths += map(len, ended)
            hashes += [hash_key(document.key) for document in documents]
            flat = np.concatenate(ended).tobytes()
            content.update(flat)
            tokens(flat)
            keys("".join(json.dumps(document.key) + "\n" for document in documents).encode())
    if not lengths:
        raise InputError(
            "DataConfig.sources", source, "at least one document with text: the corpus is empty"
        )
    arrays = {
        "offsets": np.cumsum([0, *lengths]),
        "num_bytes": np.array(sizes),
        "key_hashes": np.uint64(hashes),
    }
    for name, array in arrays.items():
        with _writer(folder / f"{name}.bin") as write:
            write(array.tobytes())
        content.update(array.tobytes())
    _write_manifest(folder, np.dtype(dtype).name, content.hexdigest())


def _write_manifest(folder: Path, tokens_dtype: str, content: str) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    manifest = {
        "format": FORMAT,
        "tokens_dtype": tokens_dtype,
        "content": content,
        "sizes_bytes": sizes,
    }
    with _writer(folder / MANIFEST) as write:
        write(json.dumps(manifest, indent=1, sort_keys=True).encode())


def _open(folder: Path, tokenizer: Tokenizer) -> TokenCache:
    manifest = _read_manifest(folder)
    dtypes = {
        "tokens": manifest["tokens_dtype"],
        "offsets": "int64",
        "num_bytes": "int64",
        "key_hashes": "uint64",
    }
    arrays = {
        name: np.memmap(folder / f"{name}.bin", dtype, mode="r") for name, dtype in dtypes.items()
    }
    facts = {
        "fingerprint": folder.name,
        "content": manifest["content"],
        "tokenizer": tokenizer.fingerprint,
    }
    return TokenCache(**arrays, **facts, directory=folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if every file is as long as it says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = {name: (folder / name).stat().st_size for name in manifest["sizes_bytes"]}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "DataConfig.cache_directory", str(folder), f"a whole cache; delete it ({error})"
        ) from error
    if sizes != manifest["sizes_bytes"]:
        expected = (
            f"a whole cache with file sizes {manifest['sizes_bytes']}, not {sizes}; delete it"
        )
        raise InputError("DataConfig.cache_directory", str(folder), expected)
    return manifest


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents that have text, in lists that are worth encoding at once."""
    group, num_characters = [], 0
    for document in documents:
        if document.text:
            group.append(document)
            num_characters += len(document.text)
        if num_characters >= CHARACTERS_PER_ENCODE:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Any]:
    """A function that appends bytes to a file, which is on the disk when the context ends."""
    file: BinaryIO
    with _refusals_named(path):
        file = path.open("wb", buffering=0)
    with file:

        def write(content: bytes) -> None:
            with _refusals_named(path):
                view = memoryview(content)
                while view:
                    view = view[file.write(view) :]

        yield write
        with _refusals_named(path):
            os.fsync(file.fileno())


@contextlib.contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    """Turns the file system's refusal to write into InputError."""
    try:
        yield
    except OSError as error:
        expected = f"a folder that can be written and has space ({error.strerror})"
        raise InputError("DataConfig.cache_directory", str(path), expected) from error
