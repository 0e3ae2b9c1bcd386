"""Builds a corpus of several domains out of text on this machine: one compressed JSON-lines file a domain.

Documents come in the order of a hash of their keys, so a budget takes a sample. Left out: what is
not UTF-8 or is short or long, what looks like data (a line above 1,000 or a mean above 100
characters, fewer than a quarter alphanumeric; as LLM-jp filters code, arXiv 2407.03963), and
near-duplicates: more than half of the distinct lines stood in earlier ones.

python experiments/build_corpus.py runs/corpus python 45 '*.py' ENVIRONMENT/site-packages
"""

import argparse
import gzip
import json
import os
from fnmatch import fnmatch
from pathlib import Path

import zstandard

from jaxscale.data.split import hash_key

MIN_BYTES, MAX_BYTES, LEAST_LINE = 500, 200_000, 16
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("output", type=Path, help="folder")
parser.add_argument("domain", help="names the file")
parser.add_argument("megabytes", type=float, help="of text, at most")
parser.add_argument("patterns", help="globs of file names, by commas; .gz is unpacked")
parser.add_argument("folders", nargs="+")
options = parser.parse_args()


def looks_like_text(text):
    """Whether a reader would call it code or prose."""
    lines = text.splitlines()
    is_wide = max(map(len, lines)) > 1000 or len(text) > 100 * len(lines)
    return not is_wide and sum(map(str.isalnum, text)) >= len(text) / 4


def read(path):
    """The file's text, "" for one that is left out."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode(errors="replace") if MIN_BYTES <= len(data) <= MAX_BYTES else ""
    return text if "\ufffd" not in text and text.strip() and looks_like_text(text) else ""


walks = [
    (Path(folder), Path(at), names)
    for folder in options.folders
    for at, _, names in os.walk(folder)
]
files = {
    str((at / name).relative_to(folder)): at / name for folder, at, names in walks for name in names
}
chosen = [
    key
    for key in files
    if any(fnmatch(Path(key).name, each) for each in options.patterns.split(","))
]
seen, documents, num_bytes = set(), [], 0
for key in sorted(
    chosen, key=lambda key: hash_key(f"order of {key}")
):  # not of the key itself: that holds out
    if num_bytes < options.megabytes * 1e6 and files[key].is_file() and (text := read(files[key])):
        lines = {
            hash(line) for line in map(str.strip, text.splitlines()) if len(line) >= LEAST_LINE
        }
        if len(lines & seen) * 2 <= len(lines):
            documents.append({"key": key, "text": text})
            num_bytes += len(text.encode())
        seen |= lines
options.output.mkdir(parents=True, exist_ok=True)
content = zstandard.compress("".join(json.dumps(each) + "\n" for each in documents).encode(), 19)
(options.output / f"{options.domain}.jsonl.zst").write_bytes(content)
print(
    f"{options.domain}: {len(documents):,} of {len(chosen):,} files, {num_bytes / 1e6:.1f} MB of text"
)
