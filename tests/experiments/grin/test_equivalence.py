"""Student's tests against closed forms and printed tables, and when each verdict is given."""

import math

import numpy as np
import pytest
from grin_study.equivalence import compare_paired, mean_interval

from jaxscale.types import InputError

T_975 = {2: 4.302653, 4: 2.776445, 9: 2.262157}  # of every printed table, by degrees of freedom
SPREAD = np.array([-2, -1, 0, 1, 2]) / math.sqrt(2.5)  # mean 0, standard deviation 1


@pytest.mark.parametrize("degrees", T_975)
def test_an_interval_is_the_table_s(degrees):
    values = np.arange(degrees + 1.0) ** 2
    mean, (low, high) = mean_interval(values)
    variance = ((values - values.mean()) ** 2).sum() / degrees
    error = math.sqrt(variance / (degrees + 1))
    assert mean == values.mean()
    np.testing.assert_allclose([mean - low, high - mean], T_975[degrees] * error, rtol=1e-6)


def test_two_values_have_cauchy_s_interval():
    """One degree of freedom: the quantile is tan(pi (p - 1/2))."""
    mean, (low, high) = mean_interval([0.0, 2.0], 0.9)
    half_width = math.tan(0.45 * math.pi)
    np.testing.assert_allclose([mean, low, high], [1, 1 - half_width, 1 + half_width])


def test_the_p_value_is_student_s():
    """Two degrees of freedom: P(T < -t) = 1/2 - t / (2 sqrt(2 + t^2))."""
    values = np.array([-0.004, 0.001, 0.006])
    found = compare_paired(values, np.zeros(3), margin=0.01)
    t = (0.01 - 0.001) / (0.005 / math.sqrt(3))
    p = 0.5 - t / (2 * math.sqrt(2 + t * t))
    assert found.difference == pytest.approx(0.001)
    assert found.p_equivalence == pytest.approx(p)


@pytest.mark.parametrize(
    ("mean", "deviation", "verdict"),
    [
        (0.0, 0.001, "equivalent"),
        (0.005, 0.001, "equivalent"),  # certainly not 0, certainly below the margin
        (-0.02, 0.001, "different"),
        (0.02, 0.001, "different"),
        (0.012, 0.05, "undecided"),
        (0.0, 0.05, "undecided"),
        (0.0, 0.0, "equivalent"),
        (0.011, 0.0, "different"),
    ],
)
def test_verdicts(mean, deviation, verdict):
    base = np.linspace(3, 4, 5)
    found = compare_paired(base + mean + deviation * SPREAD, base, margin=0.01)
    assert found.verdict == verdict
    assert found.difference == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(("t", "verdict"), [(2.13, "undecided"), (2.134, "equivalent")])
def test_the_one_sided_tests_decide_at_their_level(t, verdict):
    """The quantile t(0.95, 4) is 2.131847: just below it and just above it."""
    deviation = 0.01 * math.sqrt(5) / t
    found = compare_paired(deviation * SPREAD, np.zeros(5), margin=0.01)
    assert found.verdict == verdict
    assert (found.p_equivalence < 0.05) == (verdict == "equivalent")


def test_pairs_take_out_what_a_seed_does_to_both():
    seeds = np.array([3.0, 3.5, 4.0, 4.5, 5.0])
    first = seeds + 1e-3 * SPREAD
    assert compare_paired(first, seeds, margin=0.01).verdict == "equivalent"
    assert compare_paired(first, seeds[::-1], margin=0.01).verdict == "undecided"


@pytest.mark.parametrize(
    ("first", "second", "margin", "named"),
    [
        ([1.0, 2.0], [1.0], 0.1, "second"),
        ([1.0], [1.0], 0.1, "values"),
        ([1.0, 2.0], [1.0, 2.0], 0.0, "margin"),
    ],
)
def test_bad_input_is_named(first, second, margin, named):
    with pytest.raises(InputError, match=named):
        compare_paired(first, second, margin=margin)
