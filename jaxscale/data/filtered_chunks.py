"""The first stage of a corpus: documents filtered chunk by chunk, with what finds duplicates.

A chunk is a folder that is there whole or not at all, and is compared with its hashes before it is
used: so a run that was killed goes on with the chunk that it was at.
"""

import collections
import concurrent.futures
import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale.data.cache_files import appending, write_errors_named
from jaxscale.data.checksums import damaged_bytes
from jaxscale.data.filters import Edit, Filters
from jaxscale.data.minhash import MinHash
from jaxscale.data.sources import ChatDocument, Document, Source, read_documents
from jaxscale.data.split import hash_text
from jaxscale.types import InputError, RunError, check_types

logger = logging.getLogger(__name__)

DIRECTORY = "directory"  # the parameter of `build_corpus`, for errors
CHUNK_CHARACTERS = 1 << 22
FACTS, DOCUMENTS, KEYS = "facts.json", "documents.jsonl", "keys.jsonl"
ARRAYS = {"text_hashes": np.uint64, "characters": np.int64, "band_keys": np.uint64}
NUM_EXAMPLES = 3
EXAMPLE_CHARACTERS = 80


@dataclasses.dataclass(frozen=True)
class CorpusPart:
    """Documents that pass the same filters.

    Args:
        name: of the part's folder in the corpus.
        source: where the documents come from.
        filters: what drops or edits them, in this order.
    """

    name: str
    source: Source
    filters: Filters = ()

    def __post_init__(self):
        check_types(self)
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise InputError("CorpusPart.name", self.name, "letters, digits, - and _")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Documents of a part, read one after the other, after its filters.

    Args:
        folder: of its files.
        counts: documents and characters that were read, and what each filter left and dropped.
    """

    folder: Path
    counts: dict[str, Any]

    def array(self, name: str) -> np.ndarray:
        """One of ARRAYS, a row a document."""
        return np.fromfile(self.folder / name, ARRAYS[name])


def filtered_chunks(
    part: CorpusPart,
    folder: Path,
    minhash: MinHash,
    num_processes: int,
) -> list[Chunk]:
    """Filters a part's documents; chunks that are whole are taken as they are.

    Args:
        part: the documents and their filters.
        folder: of the part's chunks.
        minhash: how near duplicates are found.
        num_processes: that filter; the documents are read by this process alone.
    Raises:
        InputError: the documents cannot be read, or the chunks not written.
        RunError: a process was killed.
    """
    with write_errors_named(folder, DIRECTORY):
        folder.mkdir(parents=True, exist_ok=True)
        for abandoned in folder.glob(".*"):
            shutil.rmtree(abandoned)
    folders, waiting = [], collections.deque()
    try:
        with _pool(num_processes) as pool:
            for number, documents in enumerate(_groups(part)):
                folders.append(folder / f"{number:05}")
                if not _is_whole(folders[-1]):
                    arguments = (folders[-1], documents, part, minhash)
                    waiting.append(pool.submit(_write_chunk, *arguments))
                if len(waiting) > 2 * num_processes:  # so that few chunks are in memory
                    waiting.popleft().result()
            for each in waiting:
                each.result()
    except concurrent.futures.BrokenExecutor as error:
        message = "a process that filters was killed, for its memory perhaps; start again:"
        raise RunError(f"{message} the chunks that are done are kept") from error
    return [Chunk(each, json.loads((each / FACTS).read_text())["counts"]) for each in folders]


def _pool(num_processes: int) -> concurrent.futures.Executor:
    """Runs functions in other processes, or one after the other in a thread of this one."""
    if num_processes == 1:
        return concurrent.futures.ThreadPoolExecutor(1)
    return concurrent.futures.ProcessPoolExecutor(
        num_processes,
        # A fork would copy locks that JAX's threads may hold.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
    )


def _end_with_parent() -> None:
    """Ends this process when the one that started it is killed: it would wait for ever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _groups(part: CorpusPart) -> Iterator[list[Document]]:
    """The documents in lists of some CHUNK_CHARACTERS, whatever the number of processes."""
    group: list[Document] = []
    num_characters = 0
    for document in read_documents(part.source):
        if isinstance(document, ChatDocument):
            raise InputError(f"CorpusPart.source of {part.name}", part.source, "texts, no chats")
        group.append(document)
        num_characters += len(document.text)
        if num_characters >= CHUNK_CHARACTERS:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


def _is_whole(folder: Path) -> bool:
    """Whether a chunk is there as it was written; a damaged one is removed."""
    if not folder.exists():
        return False
    try:
        hashes = json.loads((folder / FACTS).read_text())["block_hashes"]
        damaged = [
            name
            for name, digests in hashes.items()
            if damaged_bytes(folder / name, digests, is_sampled=False) is not None
        ]
    except (OSError, ValueError):
        damaged = [FACTS]
    if damaged:
        logger.warning("%s: %s is damaged, and the chunk is made again", folder, damaged[0])
        shutil.rmtree(folder)
    return not damaged


def _write_chunk(
    folder: Path,
    documents: list[Document],
    part: CorpusPart,
    minhash: MinHash,
) -> None:
    """Writes a chunk under another name, and gives it its own at the end."""
    kept, counts = _filtered(documents, part.filters)
    texts = [document.text for document in kept]
    arrays = {
        "text_hashes": np.array([hash_text(text) for text in texts], np.uint64),
        "characters": np.array([len(text) for text in texts], np.int64),
        "band_keys": minhash.band_keys(texts),
    }
    contents = {name: array.tobytes() for name, array in arrays.items()}
    keys = [f"{part.name}/{document.key}" for document in kept]
    contents[KEYS] = _lines(keys)
    contents[DOCUMENTS] = _lines({"key": key, "text": text} for key, text in zip(keys, texts))
    unfinished = folder.with_name(f".{folder.name}")
    unfinished.mkdir()
    hashes: dict[str, list[str]] = {}
    for name, content in contents.items():
        with appending(unfinished / name, hashes, DIRECTORY) as append:
            append(content)
    facts = {"counts": counts, "block_hashes": hashes}
    with appending(unfinished / FACTS, {}, DIRECTORY) as append:
        append(json.dumps(facts).encode())
    unfinished.rename(folder)


def _lines(values: Iterable[Any]) -> bytes:
    lines = (json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    return "".join(lines).encode()


def _filtered(
    documents: list[Document],
    filters: Filters,
) -> tuple[list[Document], dict[str, Any]]:
    """The documents that are left, and the counts of a `Chunk`."""
    counts = {"read": _size(documents), "filters": []}
    for each in filters:
        kept, dropped = [], []
        for document in documents:
            after, reason = _after(each, document)
            if reason is None:
                kept.append(after)
            else:
                dropped.append((hash_text(document.text), document, reason))
        examples = least_examples(
            [
                [text_hash, document.key, reason, document.text[:EXAMPLE_CHARACTERS]]
                for text_hash, document, reason in dropped
            ]
        )
        counts["filters"].append(_size(kept) | {"examples": examples})
        documents = kept
    return documents, counts


def least_examples(examples: list[list]) -> list[list]:
    """The examples that a report shows: by the hash of the text, whatever the order of files."""
    return sorted(examples)[:NUM_EXAMPLES]


def _after(each: Any, document: Document) -> tuple[Document, str | None]:
    """A document after a filter, and why it is dropped."""
    if not isinstance(each, Edit):
        return document, each.objection(document)
    text = each.edited(document.text)
    return document._replace(text=text), None if text.strip() else "nothing is left"


def _size(documents: list[Document]) -> dict[str, int]:
    return {
        "documents": len(documents),
        "characters": sum(len(document.text) for document in documents),
    }
