"""From raw text to a filtered corpus without duplicates, as JSON lines with a report.

Source: LLM-jp, arXiv 2407.03963: filters a source, then duplicates over all of them.
"""

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale.data.cache_files import appending, only_builder, write_errors_named
from jaxscale.data.filtered_chunks import (
    ARRAYS,
    DIRECTORY,
    DOCUMENTS,
    KEYS,
    Chunk,
    CorpusPart,
    filtered_chunks,
    least_examples,
)
from jaxscale.data.filters import Keywords
from jaxscale.data.minhash import MinHash, firsts_of_clusters
from jaxscale.types import InputError, check_positive

FORMAT = 1
REPORT = "report.json"
DUPLICATES = "duplicates.ndjson"  # no *.jsonl, which a source of the whole folder would read


def build_corpus(
    *,
    parts: tuple[CorpusPart, ...],
    directory: str,
    minhash: MinHash = MinHash(),
    num_processes: int = 1,
) -> dict[str, Any]:
    """Filters documents, takes duplicates out and writes the rest; prints how much is left.

    The folder has JSON lines in a folder a part, in the order in which they were read, of `text`
    and `key`, that of the source behind the part's name; `report.json`; and `duplicates.ndjson`,
    what was dropped for which document that is kept. It is there whole or not at all. A run that
    was killed goes on where it was when it is started again; its chunks lie in a hidden folder
    beside `directory`, which is removed at the end.

    Of equal texts, and of a cluster of near duplicates, the one is kept that is of the earliest
    part, and in it the one with the least hash: which documents are kept depends neither on the
    order of the files nor on the number of processes.

    Args:
        parts: the documents with their filters; of a text that two parts have, that of the first
            is kept.
        directory: of the corpus, a new one.
        minhash: how near duplicates are found.
        num_processes: that filter.
    Returns:
        The report.
    Raises:
        InputError: the documents cannot be read, no document is left, or `directory` has something
            else than this corpus.
        RunError: one of several processes was killed.
    """
    check_positive("num_processes", num_processes)
    names = [part.name for part in parts]
    if not parts or len(set(names)) < len(names):
        raise InputError("parts", names, "at least one part, each with a name of its own")
    target = Path(directory).expanduser()
    configuration = _configuration(parts, minhash)
    with only_builder(target.parent, target.name, DIRECTORY):
        if target.exists():
            report = _finished_report(target, configuration)
        else:
            work = target.parent / f".{target.name}.{configuration[:16]}"
            chunks = {
                part.name: filtered_chunks(part, work / part.name, minhash, num_processes)
                for part in parts
            }
            report = _write(chunks, parts, configuration, work / "finished")
            (work / "finished").rename(target)
            shutil.rmtree(work)
    print(_table(report))
    return report


def _configuration(parts: tuple[CorpusPart, ...], minhash: MinHash) -> str:
    """Names what is built: a hash of the parts, the state of their files and the filters."""
    facts: list[Any] = [FORMAT, dataclasses.asdict(minhash)]
    for part in parts:
        facts.append([part.name, *_named(part.source), part.source.version()])
        for each in part.filters:
            words = each.version() if isinstance(each, Keywords) else None
            facts.append([*_named(each), words])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _named(instance: Any) -> list[Any]:
    return [type(instance).__name__, dataclasses.asdict(instance)]


def _finished_report(target: Path, configuration: str) -> dict[str, Any]:
    expected = "a new folder, or that of a corpus of these documents and filters"
    try:
        report = json.loads((target / REPORT).read_text())
    except (OSError, ValueError) as error:
        raise InputError(DIRECTORY, str(target), expected) from error
    if report["configuration"] != configuration:
        raise InputError(DIRECTORY, str(target), f"{expected}: it was built from others")
    return report


def _stand_ins(parts: np.ndarray, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What stands for each document: the one of those with its text, and the one that is kept.

    Args:
        parts: int [n], the part of each document.
        arrays: of ARRAYS, by name.
    Returns:
        Two int64 [n].
    """
    order = np.lexsort((arrays["text_hashes"], parts))  # stable: then in the order of reading
    hashes = arrays["text_hashes"][order]
    _, firsts, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    of_text = firsts[inverse]
    distinct = np.sort(firsts)
    in_cluster = firsts_of_clusters(arrays["band_keys"][order[distinct]])
    of_cluster = distinct[in_cluster[np.searchsorted(distinct, of_text)]]
    equal, kept = np.empty((2, len(order)), np.int64)
    equal[order], kept[order] = order[of_text], order[of_cluster]
    return equal, kept


def _write(
    chunks: dict[str, list[Chunk]],
    parts: tuple[CorpusPart, ...],
    configuration: str,
    folder: Path,
) -> dict[str, Any]:
    """Writes the corpus anew to a folder of its own; returns its report."""
    everything = list(itertools.chain(*chunks.values()))
    arrays = {name: _joined(everything, name) for name in ARRAYS}
    num_documents = len(arrays["text_hashes"])
    if not num_documents:
        raise InputError("parts", list(chunks), "documents of which the filters leave one")
    arrays["band_keys"] = arrays["band_keys"].reshape(num_documents, -1)
    sizes = [sum(len(each.array("characters")) for each in chunks[part.name]) for part in parts]
    part_of = np.repeat(np.arange(len(parts)), sizes)
    equal, kept = _stand_ins(part_of, arrays)
    numbers = np.arange(num_documents)
    with write_errors_named(folder, DIRECTORY):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    _write_documents(chunks, kept == numbers, folder)
    _write_duplicates(everything, equal, kept, folder)
    report = {"configuration": configuration, "parts": {}}
    for number, part in enumerate(parts):
        steps = _filter_steps(part, chunks[part.name])
        for name, stands_for in (("equal texts", equal), ("near duplicates", kept)):
            is_left = (part_of == number) & (stands_for == numbers)
            characters = int(arrays["characters"][is_left].sum())
            size = {"documents": int(is_left.sum()), "characters": characters}
            steps.append({"step": name} | size)
        report["parts"][part.name] = steps
    hashes = np.sort(arrays["text_hashes"][kept == numbers])
    report["fingerprint"] = hashlib.sha256(hashes.tobytes()).hexdigest()
    with appending(folder / REPORT, {}, DIRECTORY) as append:
        append(json.dumps(report, ensure_ascii=False, indent=1).encode())
    return report


def _joined(chunks: list[Chunk], name: str) -> np.ndarray:
    return np.concatenate([chunk.array(name) for chunk in chunks])


def _write_documents(chunks: dict[str, list[Chunk]], is_kept: np.ndarray, folder: Path) -> None:
    """Copies the lines of the documents that are kept."""
    is_next_kept = iter(is_kept.tolist())
    for name, of_part in chunks.items():
        (folder / name).mkdir()
        for chunk in of_part:
            lines = _lines_of(chunk, DOCUMENTS)
            content = b"".join(itertools.compress(lines, is_next_kept))
            with appending(folder / name / f"{chunk.folder.name}.jsonl", {}, DIRECTORY) as append:
                append(content)


def _lines_of(chunk: Chunk, name: str) -> Iterator[bytes]:
    with (chunk.folder / name).open("rb") as file:
        yield from file


def _write_duplicates(
    chunks: list[Chunk],
    equal: np.ndarray,
    kept: np.ndarray,
    folder: Path,
) -> None:
    """A line for each document that another one stands for: both, and whether texts are equal."""
    dropped = np.flatnonzero(kept != np.arange(len(kept))).tolist()
    wanted = {*dropped, *kept[dropped].tolist()}
    lines = itertools.chain.from_iterable(_lines_of(chunk, KEYS) for chunk in chunks)
    keys = {number: json.loads(line) for number, line in enumerate(lines) if number in wanted}
    with appending(folder / DUPLICATES, {}, DIRECTORY) as append:
        for number in dropped:
            other = int(kept[number])
            line = {
                "key": keys[number],
                "kept": keys[other],
                "is_equal": bool(equal[number] == equal[other]),
            }
            append(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _filter_steps(part: CorpusPart, chunks: list[Chunk]) -> list[dict[str, Any]]:
    """Documents and characters that were read and that each filter left, with dropped examples."""
    counts = [chunk.counts for chunk in chunks]
    steps = [{"step": "read"} | _sum([each["read"] for each in counts])]
    for number, each in enumerate(part.filters):
        of_filter = [each["filters"][number] for each in counts]
        examples = itertools.chain.from_iterable(found["examples"] for found in of_filter)
        steps.append(
            {"step": type(each).__name__}
            | _sum(of_filter)
            | {
                "examples": [
                    {"key": key, "reason": reason, "text": text}
                    for _, key, reason, text in least_examples(list(examples))
                ]
            }
        )
    return steps


def _sum(counts: list[dict[str, Any]]) -> dict[str, int]:
    return {name: sum(each[name] for each in counts) for name in ("documents", "characters")}


def _table(report: dict[str, Any]) -> str:
    """What each step leaves of each part, in columns."""
    rows = [("part", "step", "documents", "dropped", "characters", "left")]
    for name, steps in report["parts"].items():
        before = first = steps[0]
        for step in steps:
            rows.append(
                (
                    name,
                    step["step"],
                    f"{step['documents']:,}",
                    f"{before['documents'] - step['documents']:,}",
                    f"{step['characters']:,}",
                    f"{step['characters'] / max(first['characters'], 1):.1%}",
                )
            )
            before = step
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([*lines, f"fingerprint {report['fingerprint']}"])
