"""The tokenised corpus on disk: built once for a source and a tokenizer, then memory-mapped."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale.data.sources import ChatDocument, Document, Source, num_bytes
from jaxscale.data.split import hash_key
from jaxscale.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from jaxscale.types import InputError

FORMAT = 1
MANIFEST = "manifest.json"
TRAINED = "trained.bin"  # empty unless the documents are chats
_NONE = np.zeros(0, bool)
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
        trained: bool [num_tokens], which tokens are learned to be predicted; None for all.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray
    key_hashes: np.ndarray
    fingerprint: str
    content: str
    tokenizer: str
    directory: Path
    trained: np.ndarray | None = None

    def keys(self) -> list[str]:
        """The documents' keys, in order."""
        lines = (self.directory / "keys.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def open_cache(source: Source, tokenizer: Tokenizer, directory: str | Path) -> TokenCache:
    """Opens the cache of `source` under `directory`, after building it if it is not there.

    The cache is built in a folder of another name, which is renamed at the end. So it is there
    whole or not at all, even if another process builds it too or is killed while building.

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
    """Names what a cache holds: 32 hexadecimal digits of source, version and tokenizer."""
    facts = [
        FORMAT,
        type(source).__name__,
        dataclasses.asdict(source),
        source.version(),
        tokenizer.fingerprint,
    ]
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _build(source: Source, tokenizer: Tokenizer, root: Path, name: str) -> None:
    with _lock(root, name):
        if (root / name).is_dir():  # another process built it while this one waited
            return
        # With the lock in hand, folders of this host are left over from killed processes. The lock
        # may not reach other hosts, so their folders may still be in use and are left alone.
        prefix = f".{name}.{socket.gethostname()}."
        for abandoned in root.glob(f"{prefix}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        folder = root / f"{prefix}{os.getpid()}"
        with _write_errors_named(root):
            folder.mkdir()
        try:
            _write(source, tokenizer, folder)
            _publish(folder, root / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(root: Path, name: str) -> Iterator[None]:
    """Lets one process of a host build this cache.

    The operating system releases the lock when the process that holds it dies.
    """
    with _write_errors_named(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{name}.lock").open("wb")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _publish(folder: Path, target: Path) -> None:
    """Renames a finished cache into place."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        # Another host was faster. Its cache holds the same, so it stays.


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the cache's files.

    Its content is named by a hash of the tokens, offsets, sizes and key hashes, in this order.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    lengths: list[int] = []
    sizes: list[int] = []
    hashes: list[int] = []
    content = hashlib.sha256()
    with (
        _appending(folder / "tokens.bin") as append_tokens,
        _appending(folder / "keys.jsonl") as append_keys,
        _appending(folder / TRAINED) as append_trained,
    ):
        for documents in _groups(source.documents()):
            sizes += [num_bytes(document) for document in documents]
            hashes += [hash_key(document.key) for document in documents]
            encoded, trained = _encoded(documents, tokenizer)
            append_trained(np.concatenate(trained).tobytes())
            ended = [np.append(ids, tokenizer.eos_id).astype(dtype) for ids in encoded]
            lengths += [len(ids) for ids in ended]
            flat = np.concatenate(ended).tobytes()
            content.update(flat)
            append_tokens(flat)
            lines = [json.dumps(document.key) + "\n" for document in documents]
            append_keys("".join(lines).encode())
    content.update((folder / TRAINED).read_bytes())
    if not lengths:
        expected = "at least one document with text: the corpus is empty"
        raise InputError("DataConfig.sources", source, expected)
    arrays = {
        "offsets": np.cumsum([0, *lengths]),
        "num_bytes": np.array(sizes),
        "key_hashes": np.uint64(hashes),
    }
    for name, array in arrays.items():
        with _appending(folder / f"{name}.bin") as append:
            append(array.tobytes())
        content.update(array.tobytes())
    _write_manifest(folder, np.dtype(dtype).name, content.hexdigest())


def _encoded(
    documents: list[Document] | list[ChatDocument],
    tokenizer: Tokenizer,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The tokens of documents; and of chats which are trained, the one that ends them not."""
    if not isinstance(documents[0], ChatDocument):
        return tokenizer.encode_batch([document.text for document in documents]), [_NONE]
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise InputError("TokenizerConfig.kind", type(tokenizer), "'huggingface' for chats")
    pairs = [tokenizer.encode_trained(each.text, each.trained) for each in documents]
    return [ids for ids, _ in pairs], [np.append(mask, False) for _, mask in pairs]


def _write_manifest(folder: Path, tokens_dtype: str, content: str) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    manifest = {
        "format": FORMAT,
        "tokens_dtype": tokens_dtype,
        "content": content,
        "sizes_bytes": sizes,
    }
    text = json.dumps(manifest, indent=1, sort_keys=True)
    with _appending(folder / MANIFEST) as append:
        append(text.encode())


def _open(folder: Path, tokenizer: Tokenizer) -> TokenCache:
    manifest = _read_manifest(folder)
    dtypes = {
        "tokens": manifest["tokens_dtype"],
        "offsets": "int64",
        "num_bytes": "int64",
        "key_hashes": "uint64",
    }
    arrays = {}
    for name, dtype in dtypes.items():
        arrays[name] = np.memmap(folder / f"{name}.bin", dtype, mode="r")
    is_of_chats = manifest["sizes_bytes"].get(TRAINED, 0) > 0
    return TokenCache(
        **arrays,
        trained=np.memmap(folder / TRAINED, bool, mode="r") if is_of_chats else None,
        fingerprint=folder.name,
        content=manifest["content"],
        tokenizer=tokenizer.fingerprint,
        directory=folder,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if every file is as long as it says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        written = manifest["sizes_bytes"]
        found = {name: (folder / name).stat().st_size for name in written}
    except (OSError, ValueError, KeyError) as error:
        expected = f"a whole cache; delete it ({error})"
        raise InputError("DataConfig.cache_directory", str(folder), expected) from error
    if found != written:
        expected = f"a whole cache with file sizes {written}, not {found}; delete it"
        raise InputError("DataConfig.cache_directory", str(folder), expected)
    return manifest


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents that have text, in lists long enough to be encoded in parallel."""
    group: list[Document] = []
    num_characters = 0
    for document in documents:
        if document.text:
            group.append(document)
            num_characters += len(document.text)
        if num_characters >= CHARACTERS_PER_ENCODE:
            yield group
            group = []
            num_characters = 0
    if group:
        yield group


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that appends bytes to a new file, which is on the disk when the context ends."""
    with _write_errors_named(path):
        file = path.open("wb", buffering=0)
    with file:

        def append(content: bytes) -> None:
            rest = memoryview(content)
            with _write_errors_named(path):
                while rest:
                    num_written = file.write(rest)  # may be less than it was given
                    rest = rest[num_written:]

        yield append
        with _write_errors_named(path):
            os.fsync(file.fileno())


@contextlib.contextmanager
def _write_errors_named(path: Path) -> Iterator[None]:
    """Turns the file system's refusal to write into InputError."""
    try:
        yield
    except OSError as error:
        expected = f"a folder that can be written and has space ({error.strerror})"
        raise InputError("DataConfig.cache_directory", str(path), expected) from error
