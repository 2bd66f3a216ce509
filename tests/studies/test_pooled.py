"""The interval of a difference of a few seeds, against sums by hand and against draws whose difference is known."""

import math

import numpy as np
import pytest
from scipy import stats

from hfproj.errors import UsageError
from hfproj.studies.pooled import pooled_interval


def test_spread_is_pooled_over_all_names():
    values = {"a": [1.0, 3.0], "b": [7.0, 9.0, 8.0], "c": [0.0, 2.0]}
    pooled = (2 + 2 + 2) / 4  # sums of squares over degrees of freedom
    half = stats.t.ppf(0.975, 4) * math.sqrt(pooled / 3 + pooled / 2)
    assert pooled_interval(values, "b", "a") == pytest.approx((6.0, 6.0 - half, 6.0 + half))
    half = stats.t.ppf(0.975, 4) * math.sqrt(pooled / 2)  # one value is taken as known
    assert pooled_interval({**values, "d": [1.0]}, "a", "d") == pytest.approx((1.0, 1.0 - half, 1.0 + half))


def test_test_rows_widen_it_with_the_degrees_of_freedom_of_both():
    values = {"a": [0.5, 0.5, 0.56], "b": [0.4, 0.4, 0.46]}
    of_seeds = 2 * (0.0048 / 4) / 3  # each has a sum of squares of 0.0024
    of_rows = 0.52 * 0.48 / 100 + 0.42 * 0.58 / 100
    free = 4 * ((of_seeds + of_rows) / of_seeds) ** 2
    half = stats.t.ppf(0.975, free) * math.sqrt(of_seeds + of_rows)
    assert pooled_interval(values, "a", "b", rows=100) == pytest.approx((0.1, 0.1 - half, 0.1 + half))
    without = pooled_interval(values, "a", "b")
    assert without.high - without.low < 2 * half


def test_it_holds_the_true_difference_as_often_as_it_says():
    draws = np.random.default_rng(0).normal([[0.0], [1.0], [5.0]], 2.0, size=(2000, 3, 3))
    found = [pooled_interval(dict(zip("abc", draw.tolist())), "b", "a") for draw in draws]
    held = np.mean([low <= 1.0 <= high for _, low, high in found])
    assert abs(held - 0.95) < 0.015  # three standard errors


@pytest.mark.parametrize(
    ("values", "rows", "words"),
    [
        ({"a": [1.0, 2.0]}, 0, "Expected values of 'b'"),
        ({"a": [1.0], "b": [2.0]}, 0, "two seeds at least"),
        ({"a": [1.0, 3.0], "b": [2.0, 2.0]}, 10, "fractions of right answers"),
    ],
)
def test_what_cannot_be_compared(values, rows, words):
    with pytest.raises(UsageError, match=words):
        pooled_interval(values, "a", "b", rows=rows)
