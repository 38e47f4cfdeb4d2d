"""What several seeds say together."""

from __future__ import annotations

import warnings

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def mean_interval(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean along an axis, and the ends of its confidence interval.

    The interval is Student's t of the mean, ``mean ± t · s / √n`` at 95%, taking the values for independent
    and near normal (Student 1908).

    Args:
        values: any shape; NaN is left out.
        axis: the one that goes.

    Returns:
        Mean, lower and upper end, of the shape without ``axis``; the ends of fewer than two values are NaN,
        as is the mean of none.
    """
    count = np.isfinite(values).sum(axis)
    with warnings.catch_warnings():
        # Of no values the mean is NaN, and of one the deviation: that is what is meant.
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = np.nanmean(values, axis=axis)
        deviation = np.nanstd(values, axis=axis, ddof=1)
        reach = stats.t.ppf((1 + CONFIDENCE) / 2, np.maximum(count - 1, 1)) * deviation / np.sqrt(count)
    reach = np.where(count > 1, reach, np.nan)
    return mean, mean - reach, mean + reach
