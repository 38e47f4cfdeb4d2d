"""How far apart two pictures are, and what one of the shapes world shows."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from workbench.errors import InputError, UnknownNameError, nearest
from workbench.zoo.shapes import COLOURS, SHAPES, SIDE, read

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
"""The window of `ssim`, in pixels, and the paper's constants for a range of 1."""


def difference(first: Image.Image, second: Image.Image) -> float:
    """Return the mean absolute difference of two pictures' pixels, in [0, 1]."""
    one, other = _pair(first, second)
    return float(np.abs(one - other).mean())


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two pictures in decibels; infinite for equal ones.

    The squared error is the mean over pixels and channels, the peak 1.
    """
    one, other = _pair(first, second)
    error = float(((one - other) ** 2).mean())
    return -10 * math.log10(error) if error else math.inf


def ssim(first: Image.Image, second: Image.Image) -> float:
    """Return the structural similarity of two pictures, at most 1.

    Wang et al. 2004 (doi:10.1109/TIP.2003.819861): a Gaussian window of 11 × 11 pixels and σ 1.5, the mean
    over the windows that lie inside and over the channels, each compared by itself.

    Raises:
        InputError: pictures of different sizes, or smaller than a window.
    """
    one, other = (each.astype(np.float64) for each in _pair(first, second))
    if min(one.shape[:2]) < _WINDOW:
        raise InputError(
            f"ssim looks at windows of {_WINDOW} × {_WINDOW} pixels; {_size(first)} are too few."
        )
    mean, other_mean = _smooth(one), _smooth(other)
    variance, other_variance = _smooth(one**2) - mean**2, _smooth(other**2) - other_mean**2
    covariance = _smooth(one * other) - mean * other_mean
    likeness = (2 * mean * other_mean + _C1) * (2 * covariance + _C2)
    likeness /= (mean**2 + other_mean**2 + _C1) * (variance + other_variance + _C2)
    edge = _WINDOW // 2
    return float(likeness[edge:-edge, edge:-edge].mean())


def mask_iou(first: Image.Image, second: Image.Image) -> float:
    """Return how well the things in two pictures of the shapes world stand in one place, in [0, 1].

    That is the intersection of what `zoo.shapes.read` finds to belong to any thing, over its union; 0 where
    neither shows one.
    """
    return iou(*(_things(each) for each in (first, second)))


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Return the intersection over union of two boolean masks, ``(rows, columns)``."""
    union = np.logical_or(first, second).sum()
    return float(np.logical_and(first, second).sum() / union) if union else 0.0


def colour(image: Image.Image, wanted: str, shape: str | None = None) -> float:
    """Return 1 if a picture of the shapes world reads as having a thing of a colour, else 0.

    Args:
        image: the picture.
        wanted: the colour.
        shape: only things of this shape count; None is any.

    Raises:
        UnknownNameError: the world has no such colour or shape.
    """
    _check_word(wanted, COLOURS)
    _check_word(shape, SHAPES)
    return float(any(each.colour == wanted and shape in (None, each.shape) for each in read(image).things))


def shape(image: Image.Image, wanted: str, colour: str | None = None) -> float:
    """Return 1 if a picture of the shapes world reads as having a thing of a shape, else 0.

    Args:
        image: the picture.
        wanted: the shape.
        colour: only things of this colour count; None is any.

    Raises:
        UnknownNameError: the world has no such shape or colour.
    """
    _check_word(wanted, SHAPES)
    _check_word(colour, COLOURS)
    return float(any(each.shape == wanted and colour in (None, each.colour) for each in read(image).things))


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
    end, start = _pair(source, target)
    here, _ = _pair(image, target)
    way = end - start
    length = float((way**2).sum())
    return float(((here - start) * way).sum()) / length if length else 0.0


def difference_image(first: Image.Image, second: Image.Image) -> Image.Image:
    """Return where two pictures differ: the largest channel difference of each pixel, in grey."""
    one, other = _pair(first, second)
    apart = np.abs(one - other).max(-1)
    return Image.fromarray((apart * 255).round().astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    """Return a picture as RGB in [0, 1], ``(rows, columns, 3)``."""
    return np.asarray(image.convert("RGB"), np.float32) / 255


def _smooth(values: np.ndarray) -> np.ndarray:
    return np.asarray(gaussian_filter(values, _SIGMA, radius=_WINDOW // 2, axes=(0, 1)))


def _pair(first: Image.Image, second: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    if first.size != second.size:
        raise InputError(
            f"Pictures of {_size(first)} and {_size(second)} cannot be compared pixel by pixel. Make both of "
            "one size, or resize one first."
        )
    return pixels(first), pixels(second)


def _size(image: Image.Image) -> str:
    return f"{image.width} × {image.height} pixels"


def _things(image: Image.Image) -> np.ndarray:
    """Return where a picture shows any thing, ``(64, 64)`` boolean."""
    masks = [each.mask for each in read(image).things]
    return np.asarray(np.any(masks or np.zeros((1, SIDE, SIDE), bool), axis=0))


def _check_word(word: str | None, known: tuple[str, ...]) -> None:
    if word is not None and word not in known:
        raise UnknownNameError(f"The shapes world has no {word!r}.{nearest(str(word), known)}")
