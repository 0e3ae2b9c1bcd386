"""Begins to build a token cache and never ends: `python write_cache.py DIRECTORY`.

It prints "writing" when some tokens are on the disk, and then waits to be killed.
"""

import dataclasses
import sys

from jaxscale.data.cache import CHARACTERS_PER_ENCODE, open_cache
from jaxscale.data.sources import Document
from jaxscale.data.tokenizer import ByteTokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Has the name, fields and version of a source in test_cache.py, and so the same cache."""

    def documents(self):
        yield Document("first", "x" * CHARACTERS_PER_ENCODE)
        print("writing", flush=True)
        sys.stdin.read()  # ends only if the test dies

    def version(self):
        return []


if __name__ == "__main__":
    open_cache(Corpus(), ByteTokenizer(), sys.argv[1])
