"""A shuffle without a table: the new place of an index is computed from a key."""

import numpy as np

NUM_ROUNDS = 6
MIX = np.uint64(0x9E3779B97F4A7C15)


def permute(indices: np.ndarray, size: int, *, seed: int, stream: int, epoch: int) -> np.ndarray:
    """The images of `indices` under a permutation of range(size) that (seed, stream, epoch) choose.

    The permutation is a balanced Feistel network over the next even number of bits. Images outside
    the range are mapped again until they fall inside (cycle walking, fewer than four times on
    average). numpy's generators are not used because their streams may change between versions.

    Args:
        indices: int [n], each in range(size).
        size: number of items.
        seed: the user's seed.
        stream: tells apart what is shuffled with one seed.
        epoch: tells apart the passes.

    Returns:
        int64 [n].

    Source: Black and Rogaway 2002, Ciphers with arbitrary finite domains.
    """
    largest = max(size - 1, 1)
    half_bits = (largest.bit_length() + 1) // 2
    keys = _round_keys(seed, stream, epoch)
    images = _feistel(np.asarray(indices, np.uint64), half_bits, keys)
    outside = images >= size
    while np.any(outside):
        images[outside] = _feistel(images[outside], half_bits, keys)
        outside = images >= size
    return images.astype(np.int64)


def _round_keys(seed: int, stream: int, epoch: int) -> np.ndarray:
    keys = np.arange(NUM_ROUNDS, dtype=np.uint64)
    for number in (seed, stream, epoch):
        word = np.uint64(number % (1 << 64))  # a negative seed is one of the 2^64 words too
        keys = _scramble(keys ^ word)
    return keys


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left = values >> shift
    right = values & mask
    for key in keys:
        mixed = _scramble(right ^ key) & mask
        left, right = right, left ^ mixed
    return (left << shift) | right


def _scramble(words: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser: every input bit changes half of the output bits.

    The sums and products are modulo 2^64, as numpy computes them for arrays of uint64.
    """
    words = words + MIX
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
