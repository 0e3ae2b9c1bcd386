"""A shuffle without a table: the place of item `index` is computed from a key."""

import numpy as np

NUM_ROUNDS = 6
MIX = np.uint64(0x9E3779B97F4A7C15)


def permute(indices: np.ndarray, size: int, *, seed: int, stream: int, epoch: int) -> np.ndarray:
    """The images of `indices` under a permutation of range(size) that (seed, stream, epoch) choose.

    A balanced Feistel network over the next even number of bits; images outside the range are
    mapped again until they fall inside (cycle walking, fewer than four times on average).
    Independent of numpy's generators, whose streams may change between versions.

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
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, stream, epoch)
    images = np.asarray(indices, np.uint64)
    images = _feistel(images, half_bits, keys)
    while np.any(outside := images >= size):
        images[outside] = _feistel(images[outside], half_bits, keys)
    return images.astype(np.int64)


def _round_keys(seed: int, stream: int, epoch: int) -> np.ndarray:
    keys = np.arange(NUM_ROUNDS, dtype=np.uint64)
    for word in (seed, stream, epoch):
        keys = _scramble(keys ^ np.uint64(word % (1 << 64)))
    return keys


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right ^ key) & mask)
    return (left << shift) | right


def _scramble(words: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser: every input bit changes half of the output bits. uint64 wraps."""
    words = words + MIX
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
