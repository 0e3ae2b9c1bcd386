"""Blocks of the paged cache: who holds which, and which hold a prefix that others may share."""

import collections
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxscale.types import RunError, check_not_negative, check_positive

PADDING_BLOCK = 0  # padding rows write here, so that nothing live can be overwritten by them


class Move(NamedTuple):
    """A block's content that goes to the host's memory, or comes back, before the next step.

    Args:
        block: of the device.
        place: of the host.
        is_spill: whether it goes.
    """

    block: int
    place: int
    is_spill: bool


class BlockPool:
    """Allocates blocks and keeps what full ones hold until their place is wanted.

    Then their content may go to the host's memory, from which it comes back when a prefix asks for
    it. What has to be moved is listed, and has to be done in that order.

    Only full blocks are shared, and a sequence writes behind them, into blocks of its own: nothing
    is ever copied on write. A block is known by the digest of all tokens up to its end, so that
    equal digests mean equal keys and values.

    Source: Kwon et al. 2023, PagedAttention (arXiv 2309.06180), sections 4.1 and 4.4.
    Args:
        num_blocks: blocks that sequences may hold; they are numbered from 1, for block 0 takes
            what padding writes.
        block_size: tokens a block.
        num_places: blocks for which the host has room.
    """

    def __init__(self, num_blocks: int, block_size: int, num_places: int = 0):
        check_positive("num_blocks", num_blocks)
        check_positive("block_size", block_size)
        check_not_negative("num_places", num_places)
        self.num_places = num_places
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = collections.deque(range(1, num_blocks + 1))
        self._holders = [0] * (num_blocks + 1)
        self._digests: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}
        self._scores: dict[bytes, Sequence[Any]] = {}
        # Blocks that nobody holds and that still know a prefix, the least recently used first.
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        # The host's places, the least recently used first, and what has to be moved.
        self._spilled: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._places = list(range(num_places))
        self._moves: list[Move] = []

    @property
    def num_free(self) -> int:
        """Blocks that can be had, those included whose prefix would be forgotten."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_free

    def num_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix, given the digest of each of its blocks."""
        found = []
        for digest in digests:
            block = self._blocks.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def can_take(self, shared: Sequence[int], num_new: int) -> bool:
        """Whether `take` would succeed."""
        num_idle = sum(block in self._idle for block in shared)
        return num_idle + num_new <= self.num_free

    def take(self, shared: Sequence[int], num_new: int) -> list[int]:
        """Holds the blocks of a known prefix and new ones behind them.

        Raises:
            RunError: there are not as many.
        """
        if not self.can_take(shared, num_new):
            raise RunError(f"{num_new} blocks of the cache are wanted, {self.num_free} are free")
        for block in shared:
            self._idle.pop(block, None)
            self._holders[block] += 1
        return [*shared, *(self._new() for _ in range(num_new))]

    def load(self, blocks: Sequence[int], digests: Sequence[bytes]) -> int:
        """Has the host's content of a prefix brought into new blocks, as far as it has it.

        Args:
            blocks: that have just been taken and hold nothing yet.
            digests: of what they are to hold.
        Returns:
            How many blocks get their content.
        """
        for number, (block, digest) in enumerate(zip(blocks, digests, strict=False)):
            place = self._spilled.get(digest)
            if place is None:
                return number
            self._spilled.move_to_end(digest)
            self._moves.append(Move(block, place, is_spill=False))
            self.register(block, digest)
        return min(len(blocks), len(digests))

    def take_moves(self) -> list[Move]:
        """What has to be moved before the next step, in this order."""
        moves, self._moves = self._moves, []
        return moves

    @property
    def num_spilled(self) -> int:
        """Blocks whose content is in the host's memory."""
        return len(self._spilled)

    def release(self, blocks: Sequence[int]) -> None:
        """Lets go of blocks; the last of a prefix is the first whose place is used again.

        Raises:
            RunError: a block is not held.
        """
        for block in reversed(blocks):
            if self._holders[block] < 1:
                raise RunError(f"block {block} of the cache is released twice")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._digests:
                self._idle[block] = None
            else:
                self._free.append(block)

    def register(self, block: int, digest: bytes) -> None:
        """Makes a full block known; of two with the same content the first stays known."""
        if digest not in self._blocks and block not in self._digests:
            self._blocks[digest] = block
            self._digests[block] = digest

    def keep_scores(self, digest: bytes, scores: Sequence[Any]) -> None:
        """Keeps what is known of a block's tokens as long as the block itself is known."""
        if digest in self._blocks:
            self._scores[digest] = scores

    def scores_of(self, digest: bytes) -> Sequence[Any] | None:
        """What `keep_scores` has kept of a block's tokens, if anything."""
        return self._scores.get(digest)

    def forget(self) -> None:
        """Forgets all prefixes, as when the weights change; who holds what stays."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._blocks.clear()
        self._scores.clear()
        self._places += self._spilled.values()
        self._spilled.clear()
        self._moves.clear()
        self._digests.clear()

    def _new(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._idle.popitem(last=False)
            digest = self._digests.pop(block)
            del self._blocks[digest]
            self._scores.pop(digest, None)
            if self.num_places:
                self._spill(block, digest)
        self._holders[block] = 1
        return block

    def _spill(self, block: int, digest: bytes) -> None:
        """Has a block's content kept by the host, in the place of the least recently used."""
        if digest in self._spilled:
            self._spilled.move_to_end(digest)
            return
        place = self._places.pop() if self._places else self._spilled.popitem(last=False)[1]
        self._spilled[digest] = place
        self._moves.append(Move(block, place, is_spill=True))


class PrefixChain:
    """The digests of a sequence's full blocks, each of which covers all tokens before its end.

    Args:
        block_size: tokens a block.
        salt: what else the cache depends on, such as an adapter.
    """

    def __init__(self, block_size: int, salt: str = ""):
        self._block_size = block_size
        self._digests: list[bytes] = []
        self._last = salt.encode()

    def digests(self, tokens: Sequence[int]) -> list[bytes]:
        """The digests of the full blocks of `tokens`, which continue those given before."""
        size = self._block_size
        for number in range(len(self._digests), len(tokens) // size):
            block = np.asarray(tokens[number * size : (number + 1) * size], np.int32)
            self._last = hashlib.blake2b(self._last + block.tobytes(), digest_size=16).digest()
            self._digests.append(self._last)
        return self._digests
