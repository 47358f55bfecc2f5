"""Intervals of comparisons, held against figures of tables and against counting."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from kvmbench.traces.compare import median_interval, student_quantile


@pytest.mark.parametrize(
    ("p", "freedom", "wanted"),
    [
        # Of one and two degrees there are formulas: tan(pi (p - 1/2)), and the one below.
        (0.975, 1, math.tan(math.pi * 0.475)),
        (0.975, 2, 0.95 / math.sqrt(2 * 0.975 * 0.025)),
        # The tables' figures.
        (0.975, 10, 2.228138852),
        (0.995, 30, 2.749995654),
        (0.975, 100, 1.983971519),
        (0.975, 1000, 1.962339081),
    ],
)
def test_students_distribution_is_that_of_the_tables(p, freedom, wanted):
    assert student_quantile(p, freedom) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("p", [0.75, 0.975, 0.99995])
@pytest.mark.parametrize("freedom", [1e6, 1e7, 1e9])
def test_that_of_millions_of_exits_is_the_normal_one(p, freedom):
    assert student_quantile(p, freedom) == pytest.approx(NormalDist().inv_cdf(p), rel=1e-5)


def test_quantiles_have_no_step_where_the_way_to_them_changes():
    assert student_quantile(0.975, 1000.001) == pytest.approx(student_quantile(0.975, 999.999), rel=1e-8)


@pytest.mark.parametrize("n", [6, 7, 100, 1000, 1001, 5000])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.9999])
def test_the_interval_of_a_median_holds_it_with_that_confidence(n, confidence):
    interval = median_interval(np.arange(n), confidence)
    if interval is None:
        assert 2 * 0.5**n > 1 - confidence
        return
    low, high = (int(value) for value in interval)
    assert high == n - 1 - low
    # It lies outside when so few values or fewer are on one side of it.
    few = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        for k in range(low + 1)
    )
    assert 2 * few <= 1 - confidence + 1e-9
