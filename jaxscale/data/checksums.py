"""Hashes of a file's blocks, by which damage is found in the whole file or in a sample of it."""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

BLOCK_BYTES = 1 << 22
NUM_SAMPLED = 16
DIGEST_BYTES = 16


class BlockHashes:
    """Hashes a file's blocks of BLOCK_BYTES while it is written.

    Attributes:
        digests: BLAKE2b of each full block, in hexadecimal digits.
    """

    def __init__(self):
        self.digests: list[str] = []
        self._block = bytearray()

    def update(self, content: bytes) -> None:
        """Takes the bytes that come next in the file."""
        rest = memoryview(content)
        while rest:
            taken = rest[: BLOCK_BYTES - len(self._block)]
            self._block += taken
            rest = rest[len(taken) :]
            if len(self._block) == BLOCK_BYTES:
                self.end()

    def end(self) -> None:
        """Ends the file, whose last block may be shorter than the others."""
        if self._block:
            self.digests.append(_digest(self._block))
            self._block = bytearray()


def damaged_bytes(path: Path, digests: Sequence[str], *, is_sampled: bool) -> range | None:
    """The bytes of the first block that is not as it was when it was hashed; None if there is none.

    Args:
        path: the file.
        digests: of its blocks, from BlockHashes.
        is_sampled: looks at no more than NUM_SAMPLED blocks, others in each call: damage to a share
            f of all blocks is found with a probability of about 1 - (1 - f)^NUM_SAMPLED.

    Raises:
        OSError: the file cannot be read.
    """
    blocks = range(len(digests))
    if is_sampled:
        num_sampled = min(NUM_SAMPLED, len(digests))
        blocks = sorted(random.sample(blocks, num_sampled))
    with path.open("rb") as file:
        for block in blocks:
            first = block * BLOCK_BYTES
            file.seek(first)
            if _digest(file.read(BLOCK_BYTES)) != digests[block]:
                return range(first, first + BLOCK_BYTES)
    return None


def _digest(content: bytes | bytearray) -> str:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()
