"""MinHash: its estimate of the Jaccard similarity, its bands and its clusters."""

import numpy as np
import pytest

from jaxscale.data.minhash import BLOCK_CHARACTERS, MinHash, firsts_of_clusters
from jaxscale.types import InputError

KANA = [chr(code) for code in range(0x3041, 0x3097)]
DEVIATIONS = 5  # of the binomial distribution; one pair in a million is farther off


def random_text(random, length):
    return "".join(random.choice(KANA, length))


def edited(random, text, share):
    letters = list(text)
    for place in random.integers(0, len(text), int(len(text) * share)):
        letters[place] = random.choice(KANA)
    return "".join(letters)


def similarity(first, second):
    """The Jaccard similarity of the sets of 5-grams."""
    one, other = ({text[n : n + 5] for n in range(len(text) - 4)} for text in (first, second))
    return len(one & other) / len(one | other)


def test_the_estimate_is_binomial():
    """Pairs of all similarities and lengths: each within the bound, and together as spread."""
    random = np.random.default_rng(0)
    first = [random_text(random, int(random.integers(20, 1500))) for _ in range(100)]
    second = [edited(random, text, share) for text, share in zip(first, np.linspace(0, 0.3, 100))]
    true = np.array([similarity(*pair) for pair in zip(first, second)])
    assert true.min() < 0.15 and np.median(true) < 0.5 and true.max() == 1
    deviations = np.sqrt(true * (1 - true) / 200)
    is_between = deviations > 0
    scores = []
    for seed in (1, 2, 3, 4):
        signatures = MinHash(seed=seed).signatures(first + second)
        estimates = (signatures[:100] == signatures[100:]).mean(axis=1)
        assert (np.abs(estimates - true) <= DEVIATIONS * deviations).all()
        scores.append((estimates - true)[is_between] / deviations[is_between])
    assert abs(np.mean(scores)) < 0.25 and 0.85 < np.std(scores) < 1.15


def test_the_probability_of_a_band_is_that_of_the_formula():
    """Near the similarity at which half of the pairs are found."""
    random = np.random.default_rng(1)
    minhash = MinHash(seed=3)
    first = [random_text(random, 300) for _ in range(400)]
    second = [edited(random, text, 0.034) for text in first]
    has_band = (minhash.band_keys(first) == minhash.band_keys(second)).any(axis=1)
    true = np.array([similarity(*pair) for pair in zip(first, second)])
    probability = 1 - (1 - true**10) ** 20
    spread = np.sqrt((probability * (1 - probability)).sum())
    assert 0.3 < probability.mean() < 0.7
    assert abs(has_band.sum() - probability.sum()) < DEVIATIONS * spread


def test_signatures_depend_on_the_text_alone():
    """Not on other texts, blocks or the machine; and short texts have one too."""
    random = np.random.default_rng(2)
    long = random_text(random, BLOCK_CHARACTERS + 10)
    texts = ["", "あ", "abcd", "abcde", "😀", long, "abcdef", long[:9], "あ"]
    minhash = MinHash(num_bands=3, rows_per_band=2)
    together = minhash.band_keys(texts)
    alone = np.concatenate([minhash.band_keys([text]) for text in texts])
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(together[:-1], axis=0)) == len(texts) - 1
    assert minhash.band_keys([]).shape == (0, 3)


def mixed(value):
    """SplitMix64's finaliser on Python's integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def test_signatures_are_those_of_the_definition():
    """Computed with Python's integers, so that they stay the same from version to version."""
    text, prime = "いろはにほへと abc いろは", 0x9E3779B97F4A7C15
    ngrams = []
    for begin in range(len(text) - 2):
        value = 7  # the seed
        for letter in text[begin : begin + 3]:
            value = (value * prime + ord(letter)) % 2**64
        ngrams.append(mixed(value))
    numbers = [mixed((number + 7 * prime) % 2**64) for number in range(8)]
    expected = [
        min(((factor | 1) * ngram + term) % 2**64 for ngram in ngrams)
        for factor, term in zip(numbers[:4], numbers[4:])
    ]
    minhash = MinHash(ngram=3, num_bands=2, rows_per_band=2, seed=7)
    assert minhash.signatures([text])[0].tolist() == expected
    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first of SplitMix64(0)


def test_clusters_are_the_components_of_equal_bands():
    """Beside a search that joins sets one pair after the other."""
    random = np.random.default_rng(3)
    keys = random.integers(0, 100, (60, 3)).astype(np.uint64)
    clusters = [{number} for number in range(60)]
    for first in range(60):
        for second in range(first):
            if (keys[first] == keys[second]).any() and clusters[first] is not clusters[second]:
                joined = clusters[first] | clusters[second]
                for number in joined:
                    clusters[number] = joined
    expected = [min(cluster) for cluster in clusters]
    assert 1 < len(set(expected)) < 40
    assert firsts_of_clusters(keys).tolist() == expected
    shuffled = np.array([[1, 2], [3, 2], [3, 4], [2, 3]], np.uint64)  # 0-1-2; bands do not mix
    assert firsts_of_clusters(shuffled).tolist() == [0, 0, 0, 3]


@pytest.mark.parametrize("field", ["ngram", "num_bands", "rows_per_band", "seed"])
def test_bad_fields_are_named(field):
    with pytest.raises(InputError, match=f"MinHash.{field}"):
        MinHash(**{field: -1})
