"""How well a map and a mask meet."""

from __future__ import annotations

import numpy as np


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Return the intersection over union of two boolean masks, ``(rows, columns)``."""
    union = np.logical_or(first, second).sum()
    return float(np.logical_and(first, second).sum() / union) if union else 0.0


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return where the ``count`` largest values lie, ``(rows, columns)`` boolean."""
    order = np.argsort(values, axis=None, kind="stable")[::-1][: int(count)]
    mask = np.zeros(values.size, bool)
    mask[order] = True
    return mask.reshape(values.shape)
