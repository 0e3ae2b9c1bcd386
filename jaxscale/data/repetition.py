"""A filter of texts that repeat themselves."""

import dataclasses
import re

import numpy as np

from jaxscale.data.filters import Checked, beyond
from jaxscale.data.minhash import PRIME
from jaxscale.data.sources import Document

PIECES = {"lines": re.compile(r"\n+"), "paragraphs": re.compile(r"\n{2,}")}
FIRST_TOP, FIRST_REPEATED = 2, 5  # words of the shortest n-grams


@dataclasses.dataclass(frozen=True)
class Repetition(Checked):
    """Drops texts with many repeated lines, paragraphs or n-grams of words.

    A repeat is what has been in the text before. Shares of characters are of the whole text. Words
    stand between white space, so that of Japanese only lines and paragraphs are looked at.

    Source: Gopher, arXiv 2112.11446, table A1; not LLM-jp's.

    Args:
        lines, paragraphs: share of them that may be repeats.
        line_characters, paragraph_characters: share of characters that may be in repeats.
        top_ngrams: share of characters in the most frequent n-gram, of 2, 3 and 4 words.
        repeated_ngrams: share of characters in repeats of n-grams, of 5, 6 and so on to 10 words.
    """

    lines: float = 0.30
    paragraphs: float = 0.30
    line_characters: float = 0.20
    paragraph_characters: float = 0.20
    top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)
    repeated_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)

    def objection(self, document: Document) -> str | None:
        """The first share of lines, paragraphs or n-grams that is out of bounds."""
        text = document.text.strip()
        of_pieces = self._of_pieces(
            text, "lines", self.lines, self.line_characters
        ) or self._of_pieces(text, "paragraphs", self.paragraphs, self.paragraph_characters)
        return of_pieces or self._of_ngrams(text)

    def _of_pieces(
        self,
        text: str,
        name: str,
        at_most: float,
        characters_at_most: float,
    ) -> str | None:
        pieces = PIECES[name].split(text)
        others = {piece: len(piece) for piece in pieces}
        share = (len(pieces) - len(others)) / len(pieces)
        num_repeated = sum(map(len, pieces)) - sum(others.values())
        of_characters = num_repeated / max(len(text), 1)
        return beyond(f"share of repeated {name}", share, None, at_most) or beyond(
            f"share of characters in repeated {name}", of_characters, None, characters_at_most
        )

    def _of_ngrams(self, text: str) -> str | None:
        words = text.split()
        numbers: dict[str, int] = {}
        ids = [numbers.setdefault(word, len(numbers)) for word in words]
        sizes = np.array([len(word) for word in words], np.int64)
        for length, at_most in enumerate(self.top_ngrams, FIRST_TOP):
            share = _in_top_ngram(np.uint64(ids), sizes, length) / max(len(text), 1)
            if reason := beyond(f"share of the top {length}-gram", share, None, at_most):
                return reason
        for length, at_most in enumerate(self.repeated_ngrams, FIRST_REPEATED):
            share = _in_repeats(np.uint64(ids), sizes, length) / max(len(text), 1)
            if reason := beyond(f"share of repeated {length}-grams", share, None, at_most):
                return reason
        return None


def _in_top_ngram(ids: np.ndarray, sizes: np.ndarray, length: int) -> int:
    """Characters in the most frequent n-gram, if it comes twice, with spaces between its words.

    Args:
        ids: uint64 [n], the words' numbers.
        sizes: int64 [n], their characters.
        length: words of an n-gram.
    """
    _, firsts, counts = np.unique(
        _ngrams(ids, length),
        return_index=True,
        return_counts=True,
    )
    most = max(counts.max(initial=0), 2)
    begins = firsts[counts == most]
    ends = np.append(0, np.cumsum(sizes))
    longest = (ends[begins + length] - ends[begins]).max(initial=1 - length)
    return most * (longest + length - 1)


def _in_repeats(ids: np.ndarray, sizes: np.ndarray, length: int) -> int:
    """Characters of the words in n-grams that have been before; arguments as above."""
    hashes = _ngrams(ids, length)
    _, firsts = np.unique(hashes, return_index=True)
    is_repeat = np.ones(len(hashes), bool)
    is_repeat[firsts] = False
    is_covered = np.zeros(len(ids), bool)
    for place in range(length):
        covered = is_covered[place : place + len(hashes)]
        covered |= is_repeat
    return sizes[is_covered].sum()


def _ngrams(ids: np.ndarray, length: int) -> np.ndarray:
    """Hash of each n-gram of words, by its first word."""
    num_ngrams = max(len(ids) - length + 1, 0)
    hashes = np.zeros(num_ngrams, np.uint64)
    for place in range(length):
        hashes = hashes * PRIME + ids[place : place + num_ngrams]
    return hashes
