"""Which documents are held out: decided by a hash of the key, so that it never depends on order, machine or seed."""

import hashlib
from collections.abc import Iterable
from typing import Literal

import numpy as np

from jaxscale.types import InputError

Split = Literal["train", "held_out"]
HASH_BITS = 64


def hash_key(key: str) -> int:
    """The first 64 bits of the key's BLAKE2b hash."""
    # File names that are not UTF-8 reach us with surrogates.
    digest = hashlib.blake2b(
        key.encode(errors="surrogatepass"), digest_size=HASH_BITS // 8
    ).digest()
    return int.from_bytes(digest, "little")


def is_held_out(hashes: Iterable[int], held_out_fraction: float) -> np.ndarray:
    """Whether documents with these key hashes are held out; about `held_out_fraction` of them are. Returns bool [n]."""
    return np.asarray(hashes, np.uint64).astype(np.float64) < held_out_fraction * 2.0**HASH_BITS


def check_held_out_fraction(parameter: str, fraction: float) -> None:
    """Raises InputError unless 0 <= fraction < 1."""
    if not 0 <= fraction < 1:
        raise InputError(parameter, fraction, "a fraction with 0 <= fraction < 1")
