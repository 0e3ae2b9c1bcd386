"""Are two ways of training equally good? Paired t-tests of a difference, and of equivalence."""

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
        interval: confidence interval of the difference, at confidence 1 - alpha.
        inner_interval: the same at confidence 1 - 2 alpha. It lies within the margin exactly when
            both one-sided tests reject.
        p_equivalence: the larger p-value of the two one-sided tests.
        verdict: "equivalent" if both one-sided tests reject a difference as large as the margin;
            otherwise "different" if the two-sided test rejects that there is no difference;
            otherwise "undecided".
    """

    difference: float
    interval: tuple[float, float]
    inner_interval: tuple[float, float]
    p_equivalence: float
    verdict: str


def mean_interval(
    values: Sequence[float], confidence: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """The mean and Student's confidence interval for it.

    Args:
        values: at least two independent values.
        confidence: above 0 and below 1.
    Returns:
        (mean, (low, high)).
    Raises:
        InputError: fewer than two values, or a confidence out of range.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise InputError("values", values.shape, "two or more values in a row")
    if not 0 < confidence < 1:
        raise InputError("confidence", confidence, "0 < confidence < 1")
    degrees = len(values) - 1
    quantile = float(stdtrit(degrees, (1 + confidence) / 2))
    half_width = quantile * _standard_error(values)
    mean = float(values.mean())
    return mean, (mean - half_width, mean + half_width)


def compare_paired(
    first: Sequence[float], second: Sequence[float], *, margin: float, alpha: float = 0.05
) -> Comparison:
    """Test whether paired figures differ by less than a margin that was fixed beforehand.

    Equivalence is tested first, because a difference may be certain and still be smaller than
    what was said to matter.

    Source: Schuirmann 1987, "A comparison of the two one-sided tests procedure and the power
        approach".
    Args:
        first, second: one figure per seed, in the same order.
        margin: the smallest difference that matters, in the figures' unit.
        alpha: level of each test.
    Raises:
        InputError: the sides are of different lengths or shorter than two, or the margin is not
            positive.
    """
    check_positive("margin", margin)
    if len(first) != len(second):
        raise InputError("second", len(second), f"as many figures as in first, {len(first)}")
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    mean, interval = mean_interval(differences, 1 - alpha)
    _, inner_interval = mean_interval(differences, 1 - 2 * alpha)
    return Comparison(
        difference=mean,
        interval=interval,
        inner_interval=inner_interval,
        p_equivalence=_p_equivalence(differences, margin),
        verdict=_verdict(interval, inner_interval, margin),
    )


def _p_equivalence(differences: np.ndarray, margin: float) -> float:
    """The larger p-value of the two one-sided tests, which is that of the nearer margin."""
    distance = margin - abs(float(differences.mean()))
    error = _standard_error(differences)
    # Without any scatter the test is certain, on whichever side of the margin the mean lies.
    t = distance / error if error else math.copysign(math.inf, distance)
    degrees = len(differences) - 1
    return float(stdtr(degrees, -t))


def _verdict(
    interval: tuple[float, float], inner_interval: tuple[float, float], margin: float
) -> str:
    low, high = inner_interval
    if -margin < low and high < margin:
        return "equivalent"
    low, high = interval
    return "undecided" if low <= 0 <= high else "different"


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))
