"""Build one domain of the study's corpus from text on this machine: a compressed JSON-lines file.

Documents come in the order of a hash of their keys, so a budget takes a sample. Left out are files
that are not UTF-8, are short or long, or look like data (a line above 1,000 or a mean above 100
characters, fewer than a quarter alphanumeric; as LLM-jp filters code, arXiv 2407.03963), and
near-duplicates, of whose distinct lines more than half stood in earlier documents.

python experiments/grin/build_corpus.py runs/corpus python 45 '*.py' ENVIRONMENT/site-packages
"""

import argparse
import dataclasses
import json
from pathlib import Path

import zstandard
from grin_study.corpus import choose_documents, find_files


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder")
    parser.add_argument("domain", help="names the file")
    parser.add_argument("megabytes", type=float, help="of text, at most")
    parser.add_argument("patterns", help="globs of file names, by commas; .gz is unpacked")
    parser.add_argument("folders", nargs="+")
    return parser.parse_args()


def main():
    """Choose the documents, write them and print what they came to."""
    options = parse_arguments()
    files = find_files(options.folders, options.patterns.split(","))
    documents = list(choose_documents(files, options.megabytes * 1e6))
    lines = [json.dumps(dataclasses.asdict(each)) + "\n" for each in documents]
    content = zstandard.compress("".join(lines).encode(), 19)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{options.domain}.jsonl.zst").write_bytes(content)
    megabytes = sum(len(each.text.encode()) for each in documents) / 1e6
    counts = f"{len(documents):,} of {len(files):,} files"
    print(f"{options.domain}: {counts}, {megabytes:.1f} MB of text")


if __name__ == "__main__":
    main()
