"""Begins to build a corpus and never ends: `python write_corpus.py TEXTS DIRECTORY STAGE`.

It prints the pids of all its processes when it is at the stage, and then waits to be killed.
"""

import dataclasses
import os
import sys
import time

from jaxscale.data import build_corpus, filtered_chunks
from jaxscale.data.sources import JsonLinesSource

CHUNK_CHARACTERS = 1000


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A filter that never ends."""

    def objection(self, document):
        """As of a Predicate."""
        print(os.getpid(), flush=True)
        time.sleep(600)


def wait_at(module, name, times):
    """Lets the function wait before its return when it is called for the given time."""
    function, calls = getattr(module, name), []

    def patched(*arguments):
        calls.append(arguments)
        if len(calls) == times:
            print(os.getpid(), flush=True)
            time.sleep(600)
        return function(*arguments)

    setattr(module, name, patched)


def build(texts, directory, filters=(), num_processes=1):
    """The corpus that the tests build; small chunks, so that there are several."""
    filtered_chunks.CHUNK_CHARACTERS = CHUNK_CHARACTERS
    part = filtered_chunks.CorpusPart("texts", JsonLinesSource((texts,)), filters)
    return build_corpus.build_corpus(
        parts=(part,), directory=directory, num_processes=num_processes
    )


if __name__ == "__main__":
    _, texts, directory, stage = sys.argv
    if stage == "filter":
        wait_at(filtered_chunks, "appending", 2 * 6 + 3)  # two files of the third chunk are there
    elif stage == "cluster":
        wait_at(build_corpus, "firsts_of_clusters", 1)
    elif stage == "write":
        wait_at(build_corpus, "_write_duplicates", 1)
    is_pool = stage == "processes"
    build(texts, directory, (Waiting(),) if is_pool else (), num_processes=1 + is_pool)
