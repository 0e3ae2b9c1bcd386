"""The counting baselines: distributions, equal to a token-by-token twin, in the right order."""

from collections import Counter

import numpy as np
import pytest

from jaxscale.data.loader import DataConfig
from jaxscale.data.sources import TextSource
from jaxscale.evaluate.ngram import KneserNeyBigram, byte_unigram_bits, ngram_figures

V = 12


@pytest.fixture(scope="module")
def text():
    """4000 tokens of a chain that prefers three successors of each token; 11 never occurs."""
    generator = np.random.default_rng(0)
    tokens = [0]
    for _ in range(4000):
        preferred = (tokens[-1] * 3 + generator.integers(3)) % 11
        is_preferred = generator.random() < 0.8
        token = preferred if is_preferred else generator.integers(10)
        tokens.append(int(token))
    return np.array(tokens)


def twin(pairs, vocab_size):
    """P(w | v) by the definition, with dictionaries."""
    counts = Counter(pairs)
    num_contexts = Counter(w for _, w in counts)
    discount, lower_discount = discount_of(counts), discount_of(num_contexts)

    def lower(w):
        kept = max(num_contexts[w] - lower_discount, 0)
        spread = lower_discount * len(num_contexts) / vocab_size
        return (kept + spread) / sum(num_contexts.values())

    def probability(v, w):
        total = sum(count for (context, _), count in counts.items() if context == v)
        if not total:
            return lower(w)
        kept = max(counts[v, w] - discount, 0) / total
        num_successors = sum(context == v for context, _ in counts)
        freed = discount * num_successors / total
        return kept + freed * lower(w)

    return probability


def discount_of(counts):
    singletons = sum(count == 1 for count in counts.values())
    doubletons = sum(count == 2 for count in counts.values())
    return singletons / (singletons + 2 * doubletons) if singletons else 0.5


@pytest.mark.parametrize("size", [3, 30, 3000])
def test_probabilities_are_the_twins_and_add_up_to_one(text, size):
    context, successor = text[:size], text[1 : size + 1]
    bigram = KneserNeyBigram(context, successor, V)
    v, w = np.repeat(np.arange(V), V), np.tile(np.arange(V), V)
    probabilities = bigram.probability(v, w)
    naive = twin(list(zip(context.tolist(), successor.tolist(), strict=True)), V)
    expected = [naive(*pair) for pair in zip(v.tolist(), w.tolist(), strict=True)]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    totals = probabilities.reshape(V, V).sum(axis=1)
    np.testing.assert_allclose(totals, 1, rtol=1e-12)
    assert probabilities.min() > 0


def test_bigram_beats_a_unigram_on_new_text(text):
    train, held_out = text[:2001], text[2000:]
    bigram = KneserNeyBigram(train[:-1], train[1:], V)
    bits = -np.log2(bigram.probability(held_out[:-1], held_out[1:])).mean()
    frequencies = (np.bincount(train[:-1], minlength=V) + 1) / (2000 + V)
    unigram_bits = -np.log2(frequencies[held_out[1:]]).mean()
    assert bits < unigram_bits - 0.3


def test_byte_unigram_is_the_cross_entropy():
    train, held_out = np.zeros(256, int), np.zeros(256, int)
    train[[97, 98]] = 371, 127
    held_out[[97, 98]] = 3, 1
    expected = -(3 * np.log2(372 / 754) + np.log2(128 / 754)) / 4
    assert byte_unigram_bits(train, held_out) == pytest.approx(expected)


def test_figures_of_a_configuration(tmp_path):
    for number in range(40):
        line = f"the cat {number} sat on the mat; é the dog sat too\n"
        (tmp_path / f"{number}.txt").write_text(line * 5)
    config = DataConfig(
        sources=(TextSource(paths=(str(tmp_path),)),),
        sequence_length=16,
        batch_size=2,
        held_out_fraction=0.25,
        cache_directory=str(tmp_path / "cache"),
    )
    figures = ngram_figures(config)
    assert 0 < figures.token_bigram < figures.byte_unigram - 1 < 4
