"""What counting alone reaches on held-out text: bits per byte of a byte unigram and of a Kneser-Ney token bigram."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from jaxscale.data.corpus import Corpus
from jaxscale.data.loader import DataConfig, open_corpora
from jaxscale.data.tokenizer import Tokenizer, load_tokenizer

NUM_BYTE_VALUES = 256
# Where no count is 1, the estimate of the discount is 0 and would leave unseen pairs impossible.
DISCOUNT_WITHOUT_SINGLETONS = 0.5


@dataclasses.dataclass(frozen=True)
class NgramFigures:
    """Bits per byte of held-out text, for models fitted on the training split.

    Args:
        byte_unigram: each byte by its frequency.
        token_bigram: each token that a language model is asked for, given the one before it.
    """

    byte_unigram: float
    token_bigram: float


def ngram_figures(config: DataConfig) -> NgramFigures:
    """Fits both models on the training split of `config` and measures them on the held-out one.

    The bigram is charged for the tokens that a language model is charged for in the same split: all
    but the first of each document, with the one that ends it; and both are divided by all bytes of
    the text.

    Raises:
        InputError: as in make_loader.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    train, held_out = open_corpora(config, "train"), open_corpora(config, "held_out")
    bigram = KneserNeyBigram(*pairs(train), tokenizer.vocab_size)
    num_bytes = sum(corpus.num_bytes for corpus in held_out)
    return NgramFigures(
        byte_unigram=byte_unigram_bits(
            byte_counts(train, tokenizer), byte_counts(held_out, tokenizer)
        ),
        token_bigram=-float(np.log2(bigram.probability(*pairs(held_out))).sum()) / num_bytes,
    )


def pairs(corpora: Iterable[Corpus]) -> tuple[np.ndarray, np.ndarray]:
    """Each token that has a successor in its document, and that successor: int64 [n] twice."""
    documents = [tokens for corpus in corpora for tokens in corpus.token_arrays()]
    context = np.concatenate([tokens[:-1] for tokens in documents]).astype(np.int64)
    return context, np.concatenate([tokens[1:] for tokens in documents]).astype(np.int64)


def byte_counts(corpora: Iterable[Corpus], tokenizer: Tokenizer) -> np.ndarray:
    """How often each byte occurs in the decoded documents: int64 [256]."""
    counts = np.zeros(NUM_BYTE_VALUES, np.int64)
    for corpus in corpora:
        for tokens in corpus.token_arrays():
            text = tokenizer.decode(tokens[:-1].tolist())
            counts += np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=NUM_BYTE_VALUES)
    return counts


def byte_unigram_bits(train: np.ndarray, held_out: np.ndarray) -> float:
    """Bits per byte of `held_out` under the frequencies of `train` with one added to each count; both int [256]."""
    frequencies = (train + 1) / (train + 1).sum()
    return float(-(held_out * np.log2(frequencies)).sum() / held_out.sum())


class KneserNeyBigram:
    """Interpolated Kneser-Ney: discounted counts, backed off to in how many contexts a token occurs, then to uniform.

        P(w | v) = max(c(v w) - D, 0) / c(v .) + D N(v .) / c(v .) P'(w)
        P'(w)    = max(N(. w) - D', 0) / N(. .) + D' #{w: N(. w) > 0} / N(. .) / V

    c counts pairs, N kinds of pairs; each discount is n1 / (n1 + 2 n2), of the counts that are 1
    and 2.

    Args:
        context: int [n], tokens v.
        successor: int [n], the token w after each.
        vocab_size: V.

    Source: Chen and Goodman 1998, An empirical study of smoothing techniques, TR-10-98, section
        2.7; Kneser and Ney 1995.
    Cost: sorts the n pairs once; 8 bytes per pair and array.
    """

    def __init__(self, context: np.ndarray, successor: np.ndarray, vocab_size: int):
        self._vocab_size = vocab_size
        self._codes, self._counts = np.unique(context * vocab_size + successor, return_counts=True)
        contexts, successors = np.divmod(self._codes, vocab_size)
        self._discount = _discount(self._counts)
        self._total = np.bincount(contexts, self._counts, vocab_size)
        self._num_kinds = np.bincount(contexts, minlength=vocab_size)
        self._continuation = _discounted_shares(np.bincount(successors, minlength=vocab_size))

    def probability(self, context: np.ndarray, successor: np.ndarray) -> np.ndarray:
        """P(successor | context): float64 [n]; a context never seen leaves P'."""
        codes = context * self._vocab_size + successor
        place = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        counts = np.where(self._codes[place] == codes, self._counts[place], 0)
        total = np.maximum(self._total[context], 1)
        kept = np.maximum(counts - self._discount, 0) / total
        freed = np.where(
            self._total[context] > 0, self._discount * self._num_kinds[context] / total, 1.0
        )
        return kept + freed * self._continuation[successor]


def _discounted_shares(counts: np.ndarray) -> np.ndarray:
    """Discounted counts over their sum, what the discount frees spread evenly: float64 [V], adds up to 1."""
    discount = _discount(counts)
    freed = discount * np.count_nonzero(counts) / len(counts)
    return (np.maximum(counts - discount, 0) + freed) / counts.sum()


def _discount(counts: np.ndarray) -> float:
    singletons, doubletons = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    if singletons == 0:
        return DISCOUNT_WITHOUT_SINGLETONS
    return singletons / (singletons + 2 * doubletons)
