"""How far apart two pictures are."""

from __future__ import annotations

import numpy as np
from PIL import Image


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
