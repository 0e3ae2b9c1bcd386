"""Where the tokens of a sequence lie on the `sequence` axis."""

import dataclasses
from typing import Protocol

from jaxscale.parallel.sequence.ring import to_zigzag
from jaxscale.types import Batch


class TokenLayout(Protocol):
    """Where the tokens of a sequence lie."""

    def place(self, batch: Batch) -> Batch:
        """Local arrays [b, T / sequence] of contiguous shares, laid out."""


@dataclasses.dataclass(frozen=True)
class Contiguous:
    """Each device has consecutive tokens."""

    def place(self, batch: Batch) -> Batch:
        """The batch as it is."""
        return batch


@dataclasses.dataclass(frozen=True)
class Zigzag:
    """Each ring member has a chunk of the beginning and one of the end."""

    ring: int

    def place(self, batch: Batch) -> Batch:
        """Laid out for a ring."""
        return to_zigzag(batch, self.ring)
