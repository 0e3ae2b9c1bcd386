"""Documents for one domain of the corpus, chosen from text files on this machine."""

import dataclasses
import gzip
import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from jaxscale.data.split import hash_text

MIN_BYTES, MAX_BYTES = 500, 200_000
MAX_LINE_LENGTH, MAX_MEAN_LINE_LENGTH = 1000, 100
MIN_COMPARED_LINE = 16  # characters; shorter lines, such as brackets, stand in any file


@dataclasses.dataclass(frozen=True)
class Document:
    """A file's text. Its key is the file's path below the folder that was searched."""

    key: str
    text: str


def find_files(
    folders: Iterable[str],
    patterns: Sequence[str],
) -> dict[str, Path]:
    """Key -> path of the files whose names match one of the patterns."""
    files = {}
    for folder in folders:
        for at, _, names in os.walk(folder):
            for name in names:
                if any(fnmatch(name, pattern) for pattern in patterns):
                    path = Path(at) / name
                    files[str(path.relative_to(folder))] = path
    return files


def choose_documents(
    files: dict[str, Path],
    max_bytes: float,
) -> Iterator[Document]:
    """Yield readable, distinct documents in a pseudo-random order until there are enough bytes."""
    num_bytes = 0
    lines_before: set[int] = set()
    for key in sorted(files, key=_order):
        if num_bytes >= max_bytes:
            return
        text = _read(files[key])
        if not text:
            continue
        lines = _line_hashes(text)
        is_new = 2 * len(lines & lines_before) <= len(lines)
        lines_before |= lines
        if is_new:
            num_bytes += len(text.encode())
            yield Document(key, text)


def _order(key: str) -> int:
    # The hash of the key itself decides which documents are held out: ordering by it would make
    # the sample depend on that split.
    return hash_text(f"order of {key}")


def _read(path: Path) -> str:
    """The file's text, or "" if the file is left out."""
    if not path.is_file():
        return ""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if not MIN_BYTES <= len(data) <= MAX_BYTES:
        return ""
    text = data.decode(errors="replace")
    is_utf8 = "\ufffd" not in text
    return text if is_utf8 and text.strip() and _looks_like_text(text) else ""


def _looks_like_text(text: str) -> bool:
    """Whether a reader would call it code or prose rather than data."""
    lines = text.splitlines()
    if max(map(len, lines)) > MAX_LINE_LENGTH:
        return False
    if len(text) > MAX_MEAN_LINE_LENGTH * len(lines):
        return False
    return sum(map(str.isalnum, text)) >= len(text) / 4


def _line_hashes(text: str) -> set[int]:
    lines = map(str.strip, text.splitlines())
    return {hash(line) for line in lines if len(line) >= MIN_COMPARED_LINE}
