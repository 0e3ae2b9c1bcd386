"""Near duplicates by MinHash: signatures of texts, their bands, and clusters of equal bands.

Source: Broder 1997 (min-wise hashes); the bands are those of LLM-jp's corpus v4 (arXiv 2407.03963
    is v1's paper), which datatrove makes: 20 of 10 hashes of 64 bits, over 5-grams. Here they are
    of characters, so that Japanese needs no words; datatrove's are of words.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jaxscale.types import check_not_negative, check_positive, check_types

BLOCK_CHARACTERS = 1 << 17  # whose hashes stay in the processor's cache
PRIME = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class MinHash:
    """How texts are compared.

    Two texts whose sets of n-grams have the Jaccard similarity s have a band in common with the
    probability 1 - (1 - s^r)^b; it is 1/2 at about (1 / b)^(1 / r), here 0.74.

    Args:
        ngram: characters of an n-gram.
        num_bands: b.
        rows_per_band: r, hashes of a band.
        seed: of the hashes.
    """

    ngram: int = 5
    num_bands: int = 20
    rows_per_band: int = 10
    seed: int = 1

    def __post_init__(self):
        check_types(self)
        for name in ("ngram", "num_bands", "rows_per_band"):
            check_positive(f"MinHash.{name}", getattr(self, name))
        check_not_negative("MinHash.seed", self.seed)

    def signatures(self, texts: Sequence[str]) -> np.ndarray:
        """The least value of each hash over a text's n-grams.

        Two texts agree in about as many of them as their Jaccard similarity says.

        Args:
            texts: n of them.
        Returns:
            uint64 [n, num_bands * rows_per_band], the same on every machine.
        Cost: num_bands * rows_per_band multiplications, additions and minima a character.
        """
        factors, terms = self._functions()
        found = np.empty((len(texts), len(factors)), np.uint64)
        for block in _blocks(texts):
            ngrams, begins = self._ngrams(texts[block])
            hashed = np.empty_like(ngrams)
            for column, (factor, term) in enumerate(zip(factors, terms)):
                np.multiply(ngrams, factor, out=hashed)
                np.add(hashed, term, out=hashed)
                found[block, column] = np.minimum.reduceat(hashed, begins)
        return found

    def band_keys(self, texts: Sequence[str]) -> np.ndarray:
        """A hash of each band of n texts' signatures: uint64 [n, num_bands]."""
        shape = (len(texts), self.num_bands, self.rows_per_band)
        rows = self.signatures(texts).reshape(shape)
        keys = np.zeros(shape[:2], np.uint64)
        for row in range(self.rows_per_band):
            keys = _mixed(keys * PRIME + rows[..., row])
        return keys

    def _functions(self) -> tuple[np.ndarray, np.ndarray]:
        """Odd factor and term of each hash, which is taken modulo 2^64."""
        num_hashes = self.num_bands * self.rows_per_band
        numbers = np.arange(2 * num_hashes, dtype=np.uint64)
        seeds = np.full_like(numbers, self.seed) * PRIME
        seeded = _mixed(numbers + seeds)
        factors = seeded[:num_hashes] | np.uint64(1)
        return factors, seeded[num_hashes:]

    def _ngrams(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all texts' n-grams, and where those of each text begin.

        A text that is shorter than an n-gram is filled with zeros.
        """
        padded = [text.ljust(self.ngram, "\0") for text in texts]
        lengths = np.array([len(text) for text in padded])
        content = "".join(padded).encode("utf-32-le")
        codes = np.frombuffer(content, np.uint32).astype(np.uint64)
        num_windows = len(codes) - self.ngram + 1
        hashes = np.full(num_windows, self.seed, np.uint64)
        for place in range(self.ngram):
            window = codes[place : place + num_windows]
            hashes = hashes * PRIME + window
        is_within = np.ones(num_windows, bool)
        ends = np.cumsum(lengths)
        borders = ends[:-1]
        for reach in range(1, self.ngram):
            is_within[borders - reach] = False  # the n-gram reaches into the next text
        counts = lengths - self.ngram + 1
        begins = np.cumsum(counts) - counts
        return _mixed(hashes[is_within]), begins


def firsts_of_clusters(band_keys: np.ndarray) -> np.ndarray:
    """The first text of each text's cluster: texts with an equal band are in one.

    Args:
        band_keys: uint64 [n, num_bands].
    Returns:
        int64 [n], the least index in the cluster; its own of a text that is kept.
    """
    num_texts = len(band_keys)
    pairs = []
    for keys in band_keys.T:
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        is_same = ordered[1:] == ordered[:-1]
        pairs.append((order[:-1][is_same], order[1:][is_same]))
    first, second = np.concatenate(pairs, axis=1)
    ones = np.ones(len(first), bool)
    shape = (num_texts, num_texts)
    edges = coo_array((ones, (first, second)), shape)
    _, labels = connected_components(edges, directed=False)
    _, firsts = np.unique(labels, return_index=True)
    return firsts[labels]


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, a bijection whose output looks random."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _blocks(texts: Sequence[str]) -> Iterator[slice]:
    """Slices of the texts with some BLOCK_CHARACTERS each."""
    begin = num_characters = 0
    for number, text in enumerate(texts):
        num_characters += len(text)
        if num_characters >= BLOCK_CHARACTERS:
            yield slice(begin, number + 1)
            begin, num_characters = number + 1, 0
    if begin < len(texts):
        yield slice(begin, len(texts))
