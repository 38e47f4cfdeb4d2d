"""Scenes as pixels: anti-aliased images and the exact mask of each object.

Each shape is a signed distance function (Quilez, "2D distance functions"), whose value at a pixel's
centre, clipped to half a pixel, is how much of the pixel the shape covers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from workbench.zoo.world import GROUND_RGB, RGB, SIDE, Scene, Thing

Array = NDArray[np.float32]

_WINDOW = 36
_CHUNK = 256


def _circle(x: Array, y: Array, r: Array) -> Array:
    distance: Array = np.sqrt(x * x + y * y) - r
    return distance


def _square(x: Array, y: Array, r: Array) -> Array:
    distance: Array = np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    return distance


def _triangle(x: Array, y: Array, r: Array) -> Array:
    slanted: Array = 0.8660254 * np.abs(x) - 0.5 * y
    distance: Array = np.maximum(y, slanted) - 0.575 * r
    return distance


def _cross(x: Array, y: Array, r: Array) -> Array:
    across, along = np.abs(x), np.abs(y)
    far, near = np.maximum(across, along), np.minimum(across, along)
    distance: Array = np.maximum(far - r, near - 0.34 * r)
    return distance


_DISTANCE: dict[str, Callable[[Array, Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


def coverage(shape: str, centres: Array, radii: Array, window: int) -> Array:
    """How much of each pixel of a window a shape covers.

    Args:
        shape: one of ``SHAPES``.
        centres: (n, 2), (x, y) in pixels from the window's top left corner.
        radii: (n,), in pixels.
        window: height and width of the window, in pixels.

    Returns:
        (n, window, window), from 0 to 1.
    """
    grid = np.arange(window, dtype=np.float32) + 0.5
    x = grid[None, None, :] - centres[:, 0, None, None]
    y = grid[None, :, None] - centres[:, 1, None, None]
    x, y = np.broadcast_arrays(x, y)
    distance = _DISTANCE[shape](x, y, radii[:, None, None])
    covered: Array = np.clip(0.5 - distance, 0.0, 1.0)
    return covered


def render_many(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """Draw scenes.

    Args:
        scenes: what to draw, n of them.

    Returns:
        (n, 64, 64, 3), red, green and blue from 0 to 255.
    """
    canvas = np.empty((len(scenes), SIDE, SIDE, 3), np.uint8)
    canvas[:] = np.array([GROUND_RGB[scene.ground] for scene in scenes], np.uint8)[:, None, None, :]
    by_shape: dict[str, list[tuple[int, Thing]]] = {}
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            by_shape.setdefault(thing.shape, []).append((index, thing))
    for shape, jobs in by_shape.items():
        for start in range(0, len(jobs), _CHUNK):
            _paint(canvas, shape, jobs[start : start + _CHUNK])
    return canvas


def _paint(canvas: NDArray[np.uint8], shape: str, jobs: list[tuple[int, Thing]]) -> None:
    """Blend objects of one shape into their images, each within a window around it."""
    centres = np.array([thing.centre for _, thing in jobs], np.float32)
    radii = np.array([thing.radius for _, thing in jobs], np.float32)
    corners = np.clip(np.round(centres).astype(int) - _WINDOW // 2, 0, SIDE - _WINDOW)
    alphas = coverage(shape, centres - corners.astype(np.float32), radii, _WINDOW)[..., None]
    images = np.array([index for index, _ in jobs])[:, None, None]
    span = np.arange(_WINDOW)
    rows = corners[:, 1, None, None] + span[None, :, None]
    columns = corners[:, 0, None, None] + span[None, None, :]
    below = canvas[images, rows, columns].astype(np.float32)
    colours = np.array([RGB[thing.colour] for _, thing in jobs], np.float32)[:, None, None, :]
    blended = below + alphas * (colours - below)
    # One image may hold two objects of this shape: write them one after the other.
    for (index, _), (column, row), alpha, pixels in zip(jobs, corners, alphas, blended, strict=True):
        window = canvas[index, row : row + _WINDOW, column : column + _WINDOW]
        np.copyto(window, np.round(pixels).astype(np.uint8), where=alpha > 0)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: what to draw.

    Returns:
        (64, 64, 3), red, green and blue from 0 to 255; ``PIL.Image.fromarray`` takes it.
    """
    image: NDArray[np.uint8] = render_many([scene])[0]
    return image


def masks(scene: Scene) -> NDArray[np.bool_]:
    """The pixels of each object: those of which it covers at least half.

    Args:
        scene: the scene whose objects are wanted.

    Returns:
        (things, 64, 64), in the order of ``scene.things``.
    """
    found = np.zeros((len(scene.things), SIDE, SIDE), np.bool_)
    for index, thing in enumerate(scene.things):
        centre = np.array([thing.centre], np.float32)
        radius = np.array([thing.radius], np.float32)
        found[index] = coverage(thing.shape, centre, radius, SIDE)[0] >= 0.5
    return found
