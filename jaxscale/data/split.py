"""Which documents are held out: a hash of the text decides, not file, order, machine or seed."""

import hashlib
from collections.abc import Iterable
from typing import Literal

import numpy as np

from jaxscale.types import InputError

Split = Literal["train", "held_out"]
HeldOutBy = Literal["text", "key"]
HASH_BITS = 64


def hash_text(text: str) -> int:
    """The first 64 bits of the BLAKE2b hash of a document's text or key."""
    # The keys of files whose names are not UTF-8 contain surrogates, which encode() refuses.
    encoded = text.encode(errors="surrogatepass")
    digest = hashlib.blake2b(encoded, digest_size=HASH_BITS // 8).digest()
    return int.from_bytes(digest, "little")


def is_held_out(hashes: Iterable[int], held_out_fraction: float) -> np.ndarray:
    """Whether documents are held out; about the fraction `held_out_fraction` of them is.

    Args:
        hashes: uint64 [n], the hash_text of each document.
        held_out_fraction: 0 <= fraction < 1.

    Returns:
        bool [n].
    """
    limit = held_out_fraction * 2.0**HASH_BITS
    return np.asarray(hashes, np.uint64).astype(np.float64) < limit


def check_held_out_fraction(parameter: str, fraction: float) -> None:
    """Raises InputError unless 0 <= fraction < 1."""
    if not 0 <= fraction < 1:
        raise InputError(parameter, fraction, "a fraction with 0 <= fraction < 1")
