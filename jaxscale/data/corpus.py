"""The documents of one source that are in one split, tokenised."""

import dataclasses
import logging
from collections.abc import Iterator

import numpy as np

from jaxscale.data.cache import TokenCache
from jaxscale.data.split import HeldOutBy, Split, is_held_out
from jaxscale.types import InputError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of a cache, in its order.

    Args:
        cache: the source's tokens.
        documents: int64 [n], which documents of the cache.
        is_paired: whether each document is a pair of answers.
    """

    cache: TokenCache
    documents: np.ndarray
    is_paired: bool = False

    @property
    def offsets(self) -> np.ndarray:
        """int64 [n], the first token of each document in the cache."""
        return np.asarray(self.cache.offsets)[self.documents]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n], tokens of each document with the one that ends it."""
        return np.diff(self.cache.offsets)[self.documents]

    @property
    def num_others(self) -> int:
        """Documents of the cache that are in the other split."""
        return len(self.cache.offsets) - 1 - len(self.documents)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents' text."""
        return int(self.cache.num_bytes[self.documents].sum())

    @property
    def num_scored_bytes(self) -> int:
        """UTF-8 bytes of the documents' text, without the first token of each."""
        return int(self.cache.num_scored_bytes[self.documents].sum())

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted in one epoch.

        The first token of a document is given, not predicted. The token that ends it is predicted.
        """
        return int(self.lengths.sum()) - len(self.documents)

    def token_arrays(self) -> Iterator[np.ndarray]:
        """The tokens of each document."""
        for offset, length in zip(self.offsets, self.lengths):
            yield self.cache.tokens[offset : offset + length]


def select_split(
    cache: TokenCache,
    split: Split,
    held_out_fraction: float,
    held_out_by: HeldOutBy,
) -> Corpus:
    """The documents of `cache` that belong to `split`; there may be none."""
    hashes = cache.text_hashes if held_out_by == "text" else cache.key_hashes
    held_out = is_held_out(hashes, held_out_fraction)
    chosen = held_out if split == "held_out" else ~held_out
    return Corpus(cache, np.flatnonzero(chosen))


def pairs_that_fit(corpus: Corpus, sequence_length: int) -> Corpus:
    """A corpus of pairs of answers without those that are longer than a row.

    Args:
        corpus: its documents are pairs.
        sequence_length: T, tokens in a row.
    Raises:
        InputError: no pair is left.
    """
    lengths = corpus.lengths
    fits = lengths <= sequence_length
    num_longer = int((~fits).sum())
    if num_longer and not fits.any():
        expected = f"at least the tokens of the shortest pair, {lengths.min()}"
        raise InputError("DataConfig.sequence_length", sequence_length, expected)
    if num_longer:
        message = "%d of %d pairs are longer than sequence_length = %d and are left out"
        logger.warning(message, num_longer, len(fits), sequence_length)
    return Corpus(corpus.cache, corpus.documents[fits], is_paired=True)
