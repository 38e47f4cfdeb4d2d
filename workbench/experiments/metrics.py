"""How far apart two pictures are, and what a sweep measures of a run beside its source and target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from workbench.errors import UnknownNameError, nearest
from workbench.tracing.record import Record


def difference(first: Image.Image, second: Image.Image) -> float:
    """Return the mean absolute difference of two pictures' pixels, in [0, 1]."""
    return float(np.abs(pixels(first) - pixels(second)).mean())


def towards(image: Image.Image, target: Image.Image, source: Image.Image) -> float:
    """Return how far a picture has moved from the target's to the source's, along the line between them.

    Args:
        image: the patched run's picture.
        target: what it would be without the patch.
        source: what it would be if everything came from the source's run.

    Returns:
        ``⟨image − target, source − target⟩ / ‖source − target‖²`` over the pixels: 0 is the target, 1 the
        source, negative the other way; a change that has nothing to do with the source counts little,
        however large it is. 0 where the two are the same.
    """
    way = pixels(source) - pixels(target)
    length = float((way**2).sum())
    return float(((pixels(image) - pixels(target)) * way).sum()) / length if length else 0.0


def difference_image(first: Image.Image, second: Image.Image) -> Image.Image:
    """Return where two pictures differ: the largest channel difference of each pixel, in grey."""
    apart = np.abs(pixels(first) - pixels(second)).max(-1)
    return Image.fromarray((apart * 255).round().astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    """Return a picture as RGB in [0, 1], ``(rows, columns, 3)``."""
    return np.asarray(image.convert("RGB"), np.float32) / 255


@dataclass(frozen=True)
class Metric:
    """A number of a run, beside those of its source and its target.

    Attributes:
        name: what it is called in a sweep.
        of: called with the records of the run, the source and the target; returns a number.
        pictures: whether it looks at pictures; without, none need be decoded.
    """

    name: str
    of: Callable[[Record, Record, Record], float]
    pictures: bool = True


def metric(named: str | Metric | Callable[[Record, Record, Record], float]) -> Metric:
    """Return a metric by its name, or of a function.

    Raises:
        UnknownNameError: no such metric.
    """
    if isinstance(named, Metric):
        return named
    if callable(named):
        return Metric(getattr(named, "__name__", type(named).__name__), named)
    if named not in METRICS:
        raise UnknownNameError(f"No metric {named!r}.{nearest(str(named), METRICS)} Or give a function.")
    return METRICS[named]


def _latents(record: Record) -> torch.Tensor:
    latents = record.ticks[-1]["latents"]
    assert latents is not None
    return latents.double()


def _towards_latents(record: Record, source: Record, target: Record) -> float:
    start, way = _latents(target), _latents(source) - _latents(target)
    length = float((way**2).sum())
    return float(((_latents(record) - start) * way).sum()) / length if length else 0.0


def _difference_latents(record: Record, source: Record, target: Record) -> float:  # noqa: ARG001
    return float((_latents(record) - _latents(target)).abs().mean())


METRICS = {
    each.name: each
    for each in (
        Metric(
            "towards", lambda run, source, target: towards(run.images[0], target.images[0], source.images[0])
        ),
        Metric("difference", lambda run, _, target: difference(run.images[0], target.images[0])),
        Metric("towards_latents", _towards_latents, pictures=False),
        Metric("difference_latents", _difference_latents, pictures=False),
    )
}
"""By name: `towards` and `difference` of the pictures, and the same of the latents that the last step leaves,
which cost no decoding."""
