"""Which source serves which row: a fixed interleaving in proportion to the weights."""

import math

import numpy as np

from jaxscale.data.permutation import permute
from jaxscale.types import InputError

PERIOD = 1 << 16


class Mixture:
    """Rows 0, 1, 2, ... spread over sources, periodically and as evenly as the weights allow.

    Within a period source i has round(PERIOD * weight_i / sum of weights) rows, spaced evenly, with
    a phase that the seed chooses. So every stretch of rows holds each source's share up to about
    one row per source.

    Args:
        weights: one positive number per source, each at least 1 / PERIOD of their sum.
        seed: moves the phases.
    """

    def __init__(self, weights: tuple[float, ...], seed: int):
        counts = _rows_per_period(weights)
        num_sources = len(weights)
        numbers = np.arange(num_sources)
        images = permute(numbers, PERIOD, seed=seed, stream=num_sources, epoch=0)
        phases = images / PERIOD
        # List the rows source by source, then sort them by where they lie in the period: the row
        # of rank k of source i lies at the fraction (k + phase_i) / count_i.
        sources = np.repeat(numbers, counts)
        firsts = np.cumsum(counts) - counts
        ranks = np.arange(PERIOD) - np.repeat(firsts, counts)
        fractions = (ranks + phases[sources]) / counts[sources]
        order = np.argsort(fractions, kind="stable")
        self._rows_per_period = counts
        self._sources = sources[order]
        self._ranks = ranks[order]

    def sources(self, rows: np.ndarray) -> np.ndarray:
        """The source of each row: int64 [n]."""
        return self._sources[rows % PERIOD]

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """How many earlier rows the source of each row has served: int64 [n]."""
        periods = rows // PERIOD
        in_earlier_periods = self._rows_per_period[self.sources(rows)] * periods
        return in_earlier_periods + self._ranks[rows % PERIOD]

    def served(self, num_rows: int) -> list[int]:
        """How many of the first `num_rows` rows each source serves."""
        periods, rest = divmod(num_rows, PERIOD)
        num_sources = len(self._rows_per_period)
        in_last_period = np.bincount(self._sources[:rest], minlength=num_sources)
        return (self._rows_per_period * periods + in_last_period).tolist()


def _rows_per_period(weights: tuple[float, ...]) -> np.ndarray:
    """Rows of each source in a period: int64 [sources], adds up to PERIOD.

    The method of largest remainders: every share is rounded down, then those that lost most get
    one row more until the period is full.
    """
    if not all(0 < weight < math.inf for weight in weights):
        raise InputError("DataConfig.weights", weights, "positive numbers")
    shares = np.array(weights) / sum(weights) * PERIOD
    counts = np.floor(shares).astype(np.int64)
    largest_remainder_first = np.argsort(counts - shares, kind="stable")
    num_missing = PERIOD - counts.sum()
    counts[largest_remainder_first[:num_missing]] += 1
    if counts.min() == 0:
        expected = f"weights of at least 1/{PERIOD} of their sum"
        raise InputError("DataConfig.weights", weights, expected)
    return counts
