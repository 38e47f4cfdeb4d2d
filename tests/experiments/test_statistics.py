"""Mean and interval over seeds."""

import numpy as np
import pytest
from scipy import stats

from workbench.experiments.statistics import mean_interval


def test_interval_is_students_t_of_the_mean():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    mean, low, high = mean_interval(values, 0)
    expected = stats.t.interval(0.95, 3, loc=4.0, scale=stats.sem(values))
    assert mean == 4.0
    assert (low, high) == pytest.approx(expected)


def test_it_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4_000, 5))
    _, low, high = mean_interval(draws, 1)
    assert np.mean((low <= 3.0) & (high >= 3.0)) == pytest.approx(0.95, abs=0.015)


def test_what_is_missing_is_left_out_and_one_value_has_no_interval():
    values = np.array([[1.0, np.nan, 3.0], [5.0, np.nan, np.nan], [np.nan, np.nan, np.nan]])
    mean, low, high = mean_interval(values, 1)
    assert mean[:2].tolist() == [2.0, 5.0]
    assert np.isnan(mean[2])
    assert low[0] < 2.0 < high[0]
    assert np.isnan(low[1:]).all()
    assert np.isnan(high[1:]).all()
