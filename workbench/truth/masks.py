"""Where a map is largest."""

from __future__ import annotations

import numpy as np


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return where the ``count`` largest values lie, ``(rows, columns)`` boolean."""
    order = np.argsort(values, axis=None, kind="stable")[::-1][: int(count)]
    mask = np.zeros(values.size, bool)
    mask[order] = True
    return mask.reshape(values.shape)
