"""Builds a token cache from endless documents, says when it has begun: `python write_cache.py DIRECTORY`."""

import dataclasses
import sys

from jaxscale.data.cache import CHARACTERS_PER_ENCODE, open_cache
from jaxscale.data.sources import Document
from jaxscale.data.tokenizer import ByteTokenizer


@dataclasses.dataclass(frozen=True)
class Endless:
    """Never runs out; name and version are those of its finite twin in the test: both have one cache."""

    def documents(self):
        for number in range(sys.maxsize):
            if number == 3:
                print("writing", flush=True)
            yield Document(str(number), "x" * CHARACTERS_PER_ENCODE * (number < 3) + "y")

    def version(self):
        return []


if __name__ == "__main__":
    open_cache(Endless(), ByteTokenizer(), sys.argv[1])
