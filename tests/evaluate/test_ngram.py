"""The counting baselines: a distribution, equal to a token-by-token twin, in the right order on text with structure."""

from collections import Counter

import numpy as np
import pytest

from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.evaluate.ngram import KneserNeyBigram, byte_unigram_bits, ngram_figures

V = 12


@pytest.fixture(scope="module")
def text():
    """4000 tokens of a chain that prefers three successors of each token; token 11 never occurs."""
    generator = np.random.default_rng(0)
    tokens = [0]
    for _ in range(4000):
        preferred = (tokens[-1] * 3 + generator.integers(3)) % 11
        tokens.append(int(preferred if generator.random() < 0.8 else generator.integers(10)))
    return np.array(tokens)


def twin(pairs, vocab_size):
    """P(w | v) by the definition, with dictionaries."""

    def discount_of(counts):
        singles = sum(count == 1 for count in counts.values())
        return (
            singles / (singles + 2 * sum(count == 2 for count in counts.values()))
            if singles
            else 0.5
        )

    counts = Counter(pairs)
    kinds = Counter(w for _, w in counts)
    discount, lower_discount = discount_of(counts), discount_of(kinds)

    def lower(w):
        spread = lower_discount * len(kinds) / vocab_size
        return (max(kinds[w] - lower_discount, 0) + spread) / sum(kinds.values())

    def probability(v, w):
        total = sum(count for (context, _), count in counts.items() if context == v)
        if not total:
            return lower(w)
        different = sum(context == v for context, _ in counts)
        return max(counts[v, w] - discount, 0) / total + discount * different / total * lower(w)

    return probability


def every_pair():
    return np.repeat(np.arange(V), V), np.tile(np.arange(V), V)


@pytest.mark.parametrize("size", [3, 30, 3000])
def test_probabilities_are_the_twins_and_add_up_to_one(text, size):
    context, successor = text[:size], text[1 : size + 1]
    bigram = KneserNeyBigram(context, successor, V)
    probabilities = bigram.probability(*every_pair())
    naive = twin(list(zip(context.tolist(), successor.tolist())), V)
    expected = [naive(int(v), int(w)) for v, w in zip(*every_pair())]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    np.testing.assert_allclose(probabilities.reshape(V, V).sum(axis=1), 1, rtol=1e-12)
    assert probabilities.min() > 0


def test_bigram_beats_a_unigram_on_new_text(text):
    bigram = KneserNeyBigram(text[:2000], text[1:2001], V)
    bits = -np.log2(bigram.probability(text[2000:-1], text[2001:])).mean()
    frequencies = (np.bincount(text[:2000], minlength=V) + 1) / (2000 + V)
    assert bits < -np.log2(frequencies[text[2001:]]).mean() - 0.3


def test_byte_unigram_is_the_cross_entropy():
    train, held_out = np.zeros(256, int), np.zeros(256, int)
    train[[97, 98]] = 371, 127
    held_out[[97, 98]] = 3, 1
    expected = -(3 * np.log2(372 / 754) + np.log2(128 / 754)) / 4
    assert byte_unigram_bits(train, held_out) == pytest.approx(expected)


def test_figures_of_a_configuration(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(
            f"the cat {number} sat on the mat; é the dog sat too\n" * 5
        )
    config = DataConfig(
        sources=(TextSource(paths=(str(tmp_path),)),),
        sequence_length=16,
        batch_size=2,
        held_out_fraction=0.25,
        cache_directory=str(tmp_path / "cache"),
    )
    figures = ngram_figures(config)
    assert 0 < figures.token_bigram < figures.byte_unigram - 1 < 4
