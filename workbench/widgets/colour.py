"""Colours of maps where no browser draws them."""

from __future__ import annotations

from typing import Any

import numpy as np

# Evenly spaced samples of the published maps, the same as in extensions/widgets/src/lib/colour.ts.
_VIRIDIS = (
    "440154 481567 482677 453781 404788 39568c 33638d 2d708e 287d8e 238a8d "
    "1f968b 20a387 29af7f 3cbb75 55c667 73d055 95d840 b8de29 dce319 fde725"
)
_DIVERGING = "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f"
_EMPTY = (232, 232, 232)


def _table(stops: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """256 rows of RGB."""
    known = np.array([[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in stops.split()])
    places = np.linspace(0, len(known) - 1, 256)
    channels = [np.interp(places, np.arange(len(known)), known[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def coloured(
    values: np.ndarray[Any, Any], *, limit: float = 0.0, signed: bool = False
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Colours numbers: viridis from zero, or blue to red around zero; grey where there is none.

    Args:
        values: (height, width), NaN where there is nothing.
        limit: the value at the end of the colours; 0 takes the largest.
        signed: whether zero lies in the middle.

    Returns:
        uint8 (height, width, 3).
    """
    known = np.isfinite(values)
    largest = limit or float(np.abs(values[known]).max(initial=0.0)) or 1.0
    part = np.where(known, values, 0.0) / largest
    place = np.clip((part + 1) / 2 if signed else part, 0.0, 1.0)
    result: np.ndarray[Any, np.dtype[np.uint8]] = _table(_DIVERGING if signed else _VIRIDIS)[
        np.rint(place * 255).astype(int)
    ]
    result[~known] = _EMPTY
    return result
