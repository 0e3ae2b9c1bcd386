"""Which source serves which row: a fixed interleaving in proportion to the weights."""

import numpy as np

from jaxscale.data.permutation import permute
from jaxscale.types import InputError

PERIOD = 1 << 16


class Mixture:
    """Rows 0, 1, 2, ... spread over sources, periodically and as evenly as the weights allow.

    Within a period source i has round(PERIOD * weight_i / sum of weights) rows, spaced evenly, with
    a phase that the seed chooses; so every stretch of rows holds each source's share up to about
    one row per source.

    Args:
        weights: one positive number per source, each at least 1 / PERIOD of their sum.
        seed: moves the phases.
    """

    def __init__(self, weights: tuple[float, ...], seed: int):
        counts = _counts(weights)
        phases = (
            permute(np.arange(len(weights)), PERIOD, seed=seed, stream=len(weights), epoch=0)
            / PERIOD
        )
        owners = np.repeat(np.arange(len(weights)), counts)
        ranks = np.arange(PERIOD) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.argsort((ranks + phases[owners]) / counts[owners], kind="stable")
        self._counts = counts
        self._owners = owners[order]
        self._ranks = ranks[order]

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """The source of each row: int64 [n]."""
        return self._owners[rows % PERIOD]

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """How many earlier rows the source of each row has served: int64 [n]."""
        return self._counts[self.sources(rows)] * (rows // PERIOD) + self._ranks[rows % PERIOD]

    def served(self, num_rows: int) -> list[int]:
        """How many of the first `num_rows` rows each source serves."""
        rest = np.bincount(self._owners[: num_rows % PERIOD], minlength=len(self._counts))
        return (self._counts * (num_rows // PERIOD) + rest).tolist()


def _counts(weights: tuple[float, ...]) -> np.ndarray:
    """Rows of each source in a period, by largest remainders: int64 [sources], adds up to PERIOD."""
    if not all(0 < weight < float("inf") for weight in weights):
        raise InputError("DataConfig.weights", weights, "positive numbers")
    shares = np.array(weights) / sum(weights) * PERIOD
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: PERIOD - counts.sum()]] += 1
    if counts.min() == 0:
        raise InputError(
            "DataConfig.weights", weights, f"weights of at least 1/{PERIOD} of their sum"
        )
    return counts
