"""Read an image of the shapes world back into objects.

The ground is what the border shows. What differs from it falls into connected pieces, and pieces that
touch are parted by colour. A piece's colour is the nearest of the world's to its inside; its shape and size
are those of the drawing, among all shapes and radii, that differs least from how strongly its pixels show
that colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import ndimage

from workbench.errors import InputError
from workbench.zoo.drawing import coverage
from workbench.zoo.language import COLOURS, GROUNDS, SHAPES
from workbench.zoo.world import GROUND_RGB, RADII, RGB, SIDE

Floats = NDArray[np.float32]

SMALLEST = 40
"""Pieces of fewer pixels are taken for blemishes; the smallest drawn object has about 100."""

_FOREGROUND = 70.0
_EDGE = (RADII["small"][1] + RADII["large"][0]) / 2
_WINDOW = 44
_RADII = np.arange(6.0, 16.0, 0.5, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Found:
    """An object as read.

    Attributes:
        colour: one of ``COLOURS``.
        shape: one of ``SHAPES``.
        size: one of ``SIZES``.
        centre: (x, y) of its centroid, in pixels from the top left corner.
        radius: of the drawing that fits best, in pixels.
        mask: (64, 64), its pixels.
        misfit: how much the drawing that fits best differs, as a share of the object's area; below 0.1
            for a clean object.
    """

    colour: str
    shape: str
    size: str
    centre: tuple[float, float]
    radius: float
    mask: NDArray[np.bool_]
    misfit: float

    @property
    def pair(self) -> tuple[str, str]:
        """The (colour, shape) pair."""
        return self.colour, self.shape

    @property
    def place(self) -> str:
        """Where it stands, by its centre: the side it is nearest to, or the middle."""
        x, y = (value - SIDE / 2 for value in self.centre)
        if max(abs(x), abs(y)) < 6:
            return "middle"
        if abs(x) >= abs(y):
            return "left" if x < 0 else "right"
        return "top" if y < 0 else "bottom"


@dataclass(frozen=True, eq=False)
class Reading:
    """What an image shows.

    Attributes:
        things: its objects, largest first.
        ground: one of ``GROUNDS``.
    """

    things: tuple[Found, ...]
    ground: str

    def __str__(self) -> str:
        named = " and ".join(f"{thing.size} {thing.colour} {thing.shape}" for thing in self.things)
        return f"{named or 'nothing'} on {self.ground}"


def read(image: Image.Image | ArrayLike) -> Reading:
    """Read an image of the shapes world.

    Args:
        image: a PIL image, or an array of (height, width, 3): bytes, or floats from 0 to 1. Images of
            other sizes are resized to 64 x 64.

    Returns:
        The ground and the objects.

    Raises:
        InputError: if it is no such image.
    """
    pixels = _pixels(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground_rgb = np.median(border, axis=0)
    ground = _nearest(ground_rgb, GROUND_RGB, GROUNDS)
    pieces = _pieces(pixels, ground_rgb)
    found = [_recognise(pixels, ground_rgb, piece) for piece in pieces]
    return Reading(tuple(sorted(found, key=lambda thing: -int(thing.mask.sum()))), ground)


def _pixels(image: Image.Image | ArrayLike) -> Floats:
    """The image as (64, 64, 3) floats from 0 to 255."""
    if isinstance(image, Image.Image):
        array = np.asarray(image.convert("RGB"))
    else:
        array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3:
        raise InputError(f"An image to read has the shape (height, width, 3), not {array.shape}.")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating) or array.min() < -0.01 or array.max() > 1.01:
            raise InputError("An image to read holds bytes, or floats from 0 to 1.")
        array = np.round(array.clip(0, 1) * 255).astype(np.uint8)
    if array.shape[:2] != (SIDE, SIDE):
        array = np.asarray(Image.fromarray(array).resize((SIDE, SIDE), Image.Resampling.BOX))
    return array.astype(np.float32)


def _nearest(
    rgb: NDArray[np.floating], table: dict[str, tuple[int, int, int]], names: tuple[str, ...]
) -> str:
    distances = [float(np.linalg.norm(rgb - np.array(table[name]))) for name in names]
    return names[int(np.argmin(distances))]


def _pieces(pixels: Floats, ground_rgb: Floats) -> list[NDArray[np.bool_]]:
    """The connected pieces that differ from the ground, (64, 64) each, parted by colour where they touch."""
    foreground = np.linalg.norm(pixels - ground_rgb, axis=-1) > _FOREGROUND
    labels, count = ndimage.label(foreground)
    pieces: list[NDArray[np.bool_]] = []
    for label in range(1, count + 1):
        piece = labels == label
        if piece.sum() >= SMALLEST:
            pieces += _part(pixels, ground_rgb, piece)
    return pieces


def _part(pixels: Floats, ground_rgb: Floats, piece: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Part a piece into its colours, if it clearly has two; edge pixels go to the nearest colour inside."""
    table = np.array([RGB[name] for name in COLOURS], np.float32)
    nearest = np.linalg.norm(pixels[:, :, None] - table, axis=-1).argmin(axis=-1)
    inside = ndimage.binary_erosion(piece) & (np.linalg.norm(pixels - ground_rgb, axis=-1) > _FOREGROUND)
    cores = []
    for colour in np.unique(nearest[inside]):
        labels, count = ndimage.label(ndimage.binary_opening(inside & (nearest == colour)))
        cores += [
            labels == label for label in range(1, count + 1) if (labels == label).sum() >= SMALLEST // 2
        ]
    if len({int(nearest[core][0]) for core in cores}) < 2:
        return [piece]
    distances = np.stack([ndimage.distance_transform_edt(~core) for core in cores])
    owner = distances.argmin(axis=0)
    return [piece & (owner == index) for index in range(len(cores))]


def _recognise(pixels: Floats, ground_rgb: Floats, piece: NDArray[np.bool_]) -> Found:
    inside = ndimage.binary_erosion(piece)
    core = inside if inside.sum() >= 12 else piece
    rgb = np.median(pixels[core], axis=0)
    colour = _nearest(rgb, RGB, COLOURS)
    contrast = rgb - ground_rgb
    strength = (pixels - ground_rgb) @ contrast / float(contrast @ contrast)
    near = ndimage.binary_dilation(piece, iterations=2)
    alpha = np.where(near, strength, 0).clip(0, 1).astype(np.float32)
    centre = _centroid(alpha)
    shape, radius, misfit = _fit(alpha, centre)
    return Found(
        colour=colour,
        shape=shape,
        size="small" if radius < _EDGE else "large",
        centre=centre,
        radius=radius,
        mask=near & (alpha >= 0.5),
        misfit=misfit,
    )


def _centroid(alpha: Floats) -> tuple[float, float]:
    """(x, y) in pixels, where the centre of the first pixel is at (0.5, 0.5)."""
    y, x = ndimage.center_of_mass(alpha)
    return float(x + 0.5), float(y + 0.5)


@lru_cache(maxsize=1)
def _drawings() -> Floats:
    """Every shape at every radius, centred: (shapes, radii, window, window)."""
    centres = np.full((len(_RADII), 2), _WINDOW / 2, np.float32)
    return np.stack([coverage(shape, centres, _RADII, _WINDOW) for shape in SHAPES])


def _fit(alpha: Floats, centre: tuple[float, float]) -> tuple[str, float, float]:
    """The shape and radius whose drawing differs least, and by which share of the area."""
    x, y = centre
    rows = np.arange(_WINDOW) + y - _WINDOW / 2
    columns = np.arange(_WINDOW) + x - _WINDOW / 2
    grid = np.meshgrid(rows, columns, indexing="ij")
    window = ndimage.map_coordinates(alpha, grid, order=1, mode="constant")
    differences = np.abs(_drawings() - window).sum(axis=(2, 3))
    shape, radius = np.unravel_index(int(differences.argmin()), differences.shape)
    return SHAPES[shape], float(_RADII[radius]), float(differences.min() / max(float(alpha.sum()), 1.0))
