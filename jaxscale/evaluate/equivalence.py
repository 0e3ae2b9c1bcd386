"""Are two ways of training as good? Paired t-tests over seeds, of a difference and of its absence."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtr, stdtrit

from jaxscale.types import InputError, check_positive


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What paired runs say about a difference.

    Args:
        difference: mean of first - second.
        interval: of the difference, at confidence 1 - alpha.
        inner_interval: at confidence 1 - 2 alpha; it lies within the margin just if both one-sided
            tests reject.
        p_equivalence: larger of the two one-sided tests' p-values.
        verdict: "equivalent", both one-sided tests reject a difference as large as the margin; else
            "different", the two-sided test rejects no difference; else "undecided".
    """

    difference: float
    interval: tuple[float, float]
    inner_interval: tuple[float, float]
    p_equivalence: float
    verdict: str


def mean_interval(
    values: Sequence[float], confidence: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """Mean and Student's confidence interval of it.

    Args:
        values: at least two independent ones.
        confidence: above 0, below 1.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise InputError("values", values.shape, "two or more values in a row")
    if not 0 < confidence < 1:
        raise InputError("confidence", confidence, "0 < confidence < 1")
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * _standard_error(values)
    mean = float(values.mean())
    return mean, (mean - half, mean + half)


def compare_paired(
    first: Sequence[float], second: Sequence[float], *, margin: float, alpha: float = 0.05
) -> Comparison:
    """Tests whether paired figures differ by less than a margin that was fixed before they were seen.

    Equivalence goes first: a difference may be certain and yet smaller than what was said to
    matter.

    Source: Schuirmann 1987, "A comparison of the two one-sided tests procedure and the power
        approach".
    Args:
        first, second: one figure per seed, in the same order.
        margin: the smallest difference that matters, in the figures' unit.
        alpha: level of each test.
    Raises:
        InputError: not as many figures on both sides, fewer than two, or no margin.
    """
    check_positive("margin", margin)
    if len(first) != len(second):
        raise InputError("second", len(second), f"as many figures as in first, {len(first)}")
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    mean, interval = mean_interval(differences, 1 - alpha)
    _, inner = mean_interval(differences, 1 - 2 * alpha)
    inside, error = margin - abs(mean), _standard_error(differences)
    t = inside / error if error else math.copysign(math.inf, inside)
    if -margin < inner[0] and inner[1] < margin:
        verdict = "equivalent"
    else:
        verdict = "undecided" if interval[0] <= 0 <= interval[1] else "different"
    return Comparison(mean, interval, inner, float(stdtr(len(differences) - 1, -t)), verdict)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))
