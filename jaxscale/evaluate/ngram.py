"""What counting alone reaches on held-out text, in bits per byte: byte unigram, token bigram."""

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
        byte_unigram: predicts each byte by its frequency.
        token_bigram: predicts each token that a language model predicts, from the one before it.
    """

    byte_unigram: float
    token_bigram: float


def ngram_figures(config: DataConfig) -> NgramFigures:
    """Fit both models on the training split of `config` and measure them on the held-out split.

    The bigram is charged for the tokens that a language model is charged for in the same split:
    all but the first of each document, including the one that ends it. Its bits are divided by the
    bytes of the text after the first token, and those of the unigram by all bytes.

    Raises:
        InputError: as in make_loader.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    train = open_corpora(config, "train")
    held_out = open_corpora(config, "held_out")
    context, successor = pairs(train)
    bigram = KneserNeyBigram(context, successor, tokenizer.vocab_size)
    context, successor = pairs(held_out)
    log_probabilities = np.log2(bigram.probability(context, successor))
    num_bits = -float(log_probabilities.sum())
    num_scored_bytes = sum(corpus.num_scored_bytes for corpus in held_out)
    train_bytes = byte_counts(train, tokenizer)
    held_out_bytes = byte_counts(held_out, tokenizer)
    return NgramFigures(
        byte_unigram=byte_unigram_bits(train_bytes, held_out_bytes),
        token_bigram=num_bits / num_scored_bytes,
    )


def pairs(corpora: Iterable[Corpus]) -> tuple[np.ndarray, np.ndarray]:
    """Each token that has a successor in its document, and that successor: int64 [n] twice."""
    contexts, successors = [], []
    for corpus in corpora:
        for tokens in corpus.token_arrays():
            contexts.append(tokens[:-1])
            successors.append(tokens[1:])
    context = np.concatenate(contexts)
    successor = np.concatenate(successors)
    return context.astype(np.int64), successor.astype(np.int64)


def byte_counts(
    corpora: Iterable[Corpus],
    tokenizer: Tokenizer,
) -> np.ndarray:
    """How often each byte occurs in the decoded documents: int64 [256]."""
    counts = np.zeros(NUM_BYTE_VALUES, np.int64)
    for corpus in corpora:
        for tokens in corpus.token_arrays():
            text = tokenizer.decode(tokens[:-1].tolist())
            values = np.frombuffer(text.encode(), np.uint8)
            counts += np.bincount(values, minlength=NUM_BYTE_VALUES)
    return counts


def byte_unigram_bits(
    train: np.ndarray,
    held_out: np.ndarray,
) -> float:
    """Bits per byte of `held_out` under the frequencies of `train`, with one added to each count.

    Args:
        train: int [256], counts of each byte.
        held_out: int [256].
    """
    smoothed = train + 1
    frequencies = smoothed / smoothed.sum()
    bits = -(held_out * np.log2(frequencies))
    return float(bits.sum() / held_out.sum())


class KneserNeyBigram:
    """Interpolated Kneser-Ney: discounted counts, then the number of contexts, then uniform.

        P(w | v) = max(c(v w) - D, 0) / c(v .) + D N(v .) / c(v .) P'(w)
        P'(w)    = max(N(. w) - D', 0) / N(. .) + D' #{w: N(. w) > 0} / N(. .) / V

    c counts pairs and N counts different pairs. Each discount is n1 / (n1 + 2 n2), where n1 and n2
    are how many of the counts are 1 and 2.

    Args:
        context: int [n], tokens v.
        successor: int [n], the token w after each.
        vocab_size: V.

    Source: Chen and Goodman 1998, An empirical study of smoothing techniques, TR-10-98, section
        2.7; Kneser and Ney 1995.
    Cost: sorts the n pairs once; 8 bytes per pair and array.
    """

    def __init__(
        self,
        context: np.ndarray,
        successor: np.ndarray,
        vocab_size: int,
    ):
        self._vocab_size = vocab_size
        # A pair (v, w) is the number v V + w, so that one sorted array finds all counts.
        codes = context * vocab_size + successor
        self._codes, self._counts = np.unique(codes, return_counts=True)
        contexts, successors = np.divmod(self._codes, vocab_size)
        self._discount = _discount(self._counts)
        self._total = np.bincount(contexts, self._counts, vocab_size)
        self._num_successors = np.bincount(contexts, minlength=vocab_size)
        num_contexts = np.bincount(successors, minlength=vocab_size)
        self._continuation = _discounted_shares(num_contexts)

    def probability(
        self,
        context: np.ndarray,
        successor: np.ndarray,
    ) -> np.ndarray:
        """P(successor | context): float64 [n]. After a context never seen it is P'(successor)."""
        counts = self._count_of(context, successor)
        total = self._total[context]
        is_seen = total > 0
        total = np.maximum(total, 1)  # avoids 0 / 0 in a context never seen
        kept = np.maximum(counts - self._discount, 0)
        freed = self._discount * self._num_successors[context]
        backed_off = np.where(is_seen, freed / total, 1.0)
        return kept / total + backed_off * self._continuation[successor]

    def _count_of(
        self,
        context: np.ndarray,
        successor: np.ndarray,
    ) -> np.ndarray:
        """c(v w) of each pair, 0 for one never seen."""
        codes = context * self._vocab_size + successor
        place = np.searchsorted(self._codes, codes)
        # A code above all others would be inserted behind the last one.
        place = np.minimum(place, len(self._codes) - 1)
        is_found = self._codes[place] == codes
        return np.where(is_found, self._counts[place], 0)


def _discounted_shares(counts: np.ndarray) -> np.ndarray:
    """Discounted counts over their sum, where all tokens share equally what the discount frees.

    Args:
        counts: int [V].
    Returns:
        float64 [V], which adds up to 1.
    """
    discount = _discount(counts)
    freed = discount * np.count_nonzero(counts)
    kept = np.maximum(counts - discount, 0)
    numerator = kept + freed / len(counts)
    return numerator / counts.sum()


def _discount(counts: np.ndarray) -> float:
    """The discount n1 / (n1 + 2 n2) of counts."""
    singletons = np.count_nonzero(counts == 1)
    doubletons = np.count_nonzero(counts == 2)
    if singletons == 0:
        return DISCOUNT_WITHOUT_SINGLETONS
    return singletons / (singletons + 2 * doubletons)
