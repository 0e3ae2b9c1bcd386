"""The tokenised corpus on disk: built once for a source and a tokenizer, then memory-mapped."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale.data.cache_files import appending, only_builder, write_errors_named
from jaxscale.data.checksums import damaged_bytes
from jaxscale.data.encoding import encoded, split_text
from jaxscale.data.sources import Document, Source, read_documents
from jaxscale.data.split import hash_text
from jaxscale.data.tokenizer_kinds import Tokenizer
from jaxscale.types import InputError

FORMAT = 2
MANIFEST = "manifest.json"
TRAINED = "trained.bin"  # empty unless the documents are chats
CHARACTERS_PER_ENCODE = 1 << 22
TOKENS = "tokens.bin"
KEYS = "keys.jsonl"


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """The documents of one source as tokens, each followed by the end-of-document token.

    Args:
        tokens: uint16 or uint32 [num_tokens], memory-mapped.
        offsets: int64 [num_documents + 1]; document d is tokens[offsets[d]:offsets[d + 1]].
        num_bytes: int64 [num_documents], UTF-8 bytes of the text.
        num_scored_bytes: int64 [num_documents], the same without the document's first token, which
            no model predicts.
        key_hashes: uint64 [num_documents], the hash_text of each key.
        text_hashes: uint64 [num_documents], the hash_text of each `split_text`.
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
    num_scored_bytes: np.ndarray
    key_hashes: np.ndarray
    text_hashes: np.ndarray
    fingerprint: str
    content: str
    tokenizer: str
    directory: Path
    trained: np.ndarray | None = None

    def keys(self) -> list[str]:
        """The documents' keys, in order."""
        return list(_read_keys(self.directory / KEYS))


def open_cache(
    source: Source,
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    is_verified: bool = False,
) -> TokenCache:
    """Opens the cache of `source` under `directory`, after building it if it is not there.

    The cache is built in a folder of another name, which is renamed at the end. So it is there
    whole or not at all, even if another process builds it too or is killed while building. It is
    compared with its hashes from then: a sample of the tokens' blocks, and the rest that is read.

    Args:
        source: where the documents come from.
        tokenizer: how text becomes tokens.
        directory: where caches are kept.
        is_verified: all tokens and keys are compared with their hashes.

    Raises:
        InputError: the source has no text or gives one key to several documents, `directory`
            cannot be written, or the cache there is damaged.
    """
    name = fingerprint(source, tokenizer)
    root = Path(directory).expanduser()
    with write_errors_named(root):  # its name may be too long to be one
        is_built = (root / name).is_dir()
    if not is_built:
        _build(source, tokenizer, root, name)
    return _open(root / name, tokenizer, is_verified=is_verified)


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
    with only_builder(root, name):
        if (root / name).is_dir():  # another process built it while this one waited
            return
        # With the lock in hand, folders of this host are left over from killed processes. The lock
        # may not reach other hosts, so their folders may still be in use and are left alone.
        prefix = f".{name}.{socket.gethostname()}."
        for abandoned in root.glob(f"{prefix}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        folder = root / f"{prefix}{os.getpid()}"
        with write_errors_named(root):
            folder.mkdir()
        try:
            _write(source, tokenizer, folder)
            _publish(folder, root / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    """Renames a finished cache into place."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        # Another host was faster. Its cache holds the same, so it stays.


@dataclasses.dataclass
class _Facts:
    """What is known of each document once it has been written, in the order of the documents."""

    num_tokens: list[int] = dataclasses.field(default_factory=list)
    num_bytes: list[int] = dataclasses.field(default_factory=list)
    num_scored_bytes: list[int] = dataclasses.field(default_factory=list)
    key_hashes: list[int] = dataclasses.field(default_factory=list)
    text_hashes: list[int] = dataclasses.field(default_factory=list)

    def arrays(self) -> dict[str, np.ndarray]:
        """As `TokenCache` has them."""
        return {
            "offsets": np.cumsum([0, *self.num_tokens]),
            "num_bytes": np.array(self.num_bytes),
            "key_hashes": np.uint64(self.key_hashes),
            "text_hashes": np.uint64(self.text_hashes),
            "num_scored_bytes": np.array(self.num_scored_bytes),
        }


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the cache's files.

    Its content is named by a hash of the tokens, which of them are trained, offsets, sizes and key
    hashes, in this order. The tokens stand for the texts.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    content = hashlib.sha256()
    hashes: dict[str, list[str]] = {}
    facts = _write_documents(source, tokenizer, folder, dtype, content, hashes)
    content.update((folder / TRAINED).read_bytes())
    if not facts.num_tokens:
        expected = "at least one document with text: the corpus is empty"
        raise InputError("DataConfig.sources", source, expected)
    arrays = facts.arrays()
    _check_keys(source, folder / KEYS, arrays["key_hashes"])
    for name in ("offsets", "num_bytes", "key_hashes"):
        content.update(arrays[name].tobytes())
    for name, array in arrays.items():
        with appending(folder / f"{name}.bin", hashes) as append:
            append(array.tobytes())
    manifest = {
        "format": FORMAT,
        "tokens_dtype": dtype.name,
        "content": content.hexdigest(),
        "sizes_bytes": {file: (folder / file).stat().st_size for file in hashes},
        "block_hashes": hashes,
    }
    with appending(folder / MANIFEST, {}) as append:
        append(json.dumps(manifest | {"sha256": _sha256(manifest)}, indent=1).encode())


def _write_documents(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: np.dtype,
    content: Any,
    hashes: dict[str, list[str]],
) -> _Facts:
    """Writes tokens, keys and which tokens are trained, as the documents are read.

    Args:
        source, tokenizer, folder: of the cache.
        dtype: of the tokens.
        content: a hash, to which the tokens are added.
        hashes: as `appending` fills them.
    """
    facts = _Facts()
    with (
        appending(folder / TOKENS, hashes) as append_tokens,
        appending(folder / KEYS, hashes) as append_keys,
        appending(folder / TRAINED, hashes) as append_trained,
    ):
        for documents in _groups(read_documents(source)):
            tokens_of, trained = encoded(documents, tokenizer)
            ended = [np.append(ids, tokenizer.eos_id).astype(dtype) for ids in tokens_of]
            tokens = np.concatenate(ended).tobytes()
            content.update(tokens)
            append_tokens(tokens)
            append_trained(np.concatenate(trained).tobytes())
            lines = [json.dumps(document.key) + "\n" for document in documents]
            append_keys("".join(lines).encode())
            facts.num_tokens += [len(ids) for ids in ended]
            facts.num_bytes += [len(document.text.encode()) for document in documents]
            facts.num_scored_bytes += map(_num_scored_bytes, repeat(tokenizer), documents, ended)
            facts.key_hashes += [hash_text(document.key) for document in documents]
            facts.text_hashes += [hash_text(split_text(document)) for document in documents]
    return facts


def _num_scored_bytes(tokenizer: Tokenizer, document: Document, ids: np.ndarray) -> int:
    """Bytes of a document's text after its first token; `ids` ends with the end of the document."""
    if len(ids) == 1:  # the text encodes to nothing
        return 0
    num_bytes = len(document.text.encode())
    return max(num_bytes - tokenizer.num_bytes(int(ids[0])), 0)


def _check_keys(source: Source, path: Path, hashes: np.ndarray) -> None:
    """Raises InputError if the source has given one key to several documents.

    Args:
        source: where the documents come from.
        path: the file of their keys.
        hashes: uint64 [num_documents], of the keys.
    """
    values, counts = np.unique(hashes, return_counts=True)
    repeated = set(values[counts > 1].tolist())
    if not repeated:
        return
    # Different keys may have one hash, but hardly ever do.
    keys = collections.Counter(key for key in _read_keys(path) if hash_text(key) in repeated)
    for key, count in keys.items():
        if count > 1:
            expected = f"a key of its own for each document; {count} have this one"
            raise InputError(f"DataConfig.sources: {type(source).__name__}", key, expected)


def _read_keys(path: Path) -> Iterator[str]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)


def _sha256(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _open(folder: Path, tokenizer: Tokenizer, *, is_verified: bool) -> TokenCache:
    with _damage_named(folder):
        manifest = _read_manifest(folder)
        _check_blocks(folder, manifest["block_hashes"], is_verified=is_verified)
    dtypes = {
        "tokens": manifest["tokens_dtype"],
        "offsets": "int64",
        "num_bytes": "int64",
        "num_scored_bytes": "int64",
        "key_hashes": "uint64",
        "text_hashes": "uint64",
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
    """The manifest, if every file is as long as it says.

    Raises:
        OSError, ValueError: it is not, or the manifest is damaged.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _sha256(manifest):
        raise ValueError(f"{MANIFEST} has changed since it was written")
    written = manifest["sizes_bytes"]
    found = {name: (folder / name).stat().st_size for name in written}
    if found != written:
        raise ValueError(f"its files have sizes {found}, not {written}")
    return manifest


def _check_blocks(folder: Path, hashes: dict[str, list[str]], *, is_verified: bool) -> None:
    """Compares files with their hashes; tokens and keys, which may be large, only in part.

    Raises:
        OSError, ValueError: a file cannot be read or has changed.
    """
    for name, digests in hashes.items():
        is_sampled = name in (TOKENS, KEYS) and not is_verified
        changed = damaged_bytes(folder / name, digests, is_sampled=is_sampled)
        if changed is not None:
            where = f"bytes {changed[0]} to {changed[-1]}"
            raise ValueError(f"{name} has changed since it was written, in {where}")


@contextlib.contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Turns what shows that a cache is damaged into InputError."""
    try:
        yield
    except (OSError, ValueError) as error:
        expected = f"a whole cache; delete it ({error})"
        raise InputError("DataConfig.cache_directory", str(folder), expected) from error


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in lists long enough to be encoded in parallel."""
    group: list[Document] = []
    num_characters = 0
    for document in documents:
        group.append(document)
        num_characters += len(document.text)
        if num_characters >= CHARACTERS_PER_ENCODE:
            yield group
            group = []
            num_characters = 0
    if group:
        yield group
