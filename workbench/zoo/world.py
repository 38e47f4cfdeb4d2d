"""The shapes world: one or two coloured shapes on a plain ground, 64 x 64 pixels.

Some (colour, shape) pairs and some combinations of two objects never occur in training, so that a
model can be asked whether it composes what it knows: ``HELD_OUT_PAIRS`` and ``HELD_OUT_COMBINATIONS``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workbench.errors import InputError, nearest
from workbench.zoo.language import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, Wording, describe

SIDE = 64
"""Height and width of an image, in pixels."""

RGB = {
    "red": (222, 36, 40),
    "yellow": (245, 220, 40),
    "green": (40, 165, 60),
    "blue": (35, 75, 220),
    "purple": (145, 50, 185),
}
GROUND_RGB = {"light": (236, 236, 232), "dark": (28, 30, 38)}

RADII = {"small": (8.5, 9.5), "large": (12.5, 13.5)}
"""Range of the radius for each size, in pixels."""

REACH = 1.15
"""How far a shape's farthest point may be from its centre, in radii."""

HELD_OUT_PAIRS = frozenset({("purple", "cross"), ("yellow", "triangle"), ("green", "square")})
"""(colour, shape) pairs that never occur in training."""

HELD_OUT_COMBINATIONS = frozenset(
    frozenset(pairs)
    for pairs in (
        (("red", "square"), ("green", "circle")),
        (("blue", "triangle"), ("yellow", "cross")),
        (("purple", "circle"), ("blue", "square")),
        (("red", "triangle"), ("green", "cross")),
    )
)
"""Sets of two (colour, shape) pairs that never stand in one training image; each alone does."""


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        colour: one of ``COLOURS``.
        shape: one of ``SHAPES``.
        size: one of ``SIZES``.
        centre: (x, y) of the centroid in pixels, from the top left corner of the image.
        radius: in pixels; the range that goes with ``size`` is in ``RADII``.
        place: where it stands, one of ``PLACES``.
    """

    colour: str
    shape: str
    size: str
    centre: tuple[float, float]
    radius: float
    place: str

    def __post_init__(self) -> None:
        for value, known in (
            (self.colour, COLOURS),
            (self.shape, SHAPES),
            (self.size, SIZES),
            (self.place, PLACES),
        ):
            _check(value, known)

    @property
    def pair(self) -> tuple[str, str]:
        """The (colour, shape) pair."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """What an image shows: its objects, and a light or dark ground."""

    things: tuple[Thing, ...]
    ground: str

    def __post_init__(self) -> None:
        _check(self.ground, GROUNDS)

    def prompt(self, wording: Wording | None = None) -> str:
        """Put the scene into words; see ``language.describe``."""
        return describe(self, wording)

    @property
    def twins(self) -> bool:
        """Whether it shows two objects of one colour and shape."""
        return len(self.things) == 2 and self.things[0].pair == self.things[1].pair

    @property
    def held_out(self) -> bool:
        """Whether the scene is one of those kept out of training."""
        pairs = frozenset(thing.pair for thing in self.things)
        return bool(pairs & HELD_OUT_PAIRS) or pairs in HELD_OUT_COMBINATIONS


def _check(value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{value!r} is not in the shapes world.{nearest(value, known)}")


def sample(
    rng: np.random.Generator, *, objects: int | None = None, held_out: bool = False, twins: bool = False
) -> Scene:
    """Draw a scene.

    Args:
        rng: where the randomness comes from.
        objects: 1 or 2; drawn (two in three scenes have 2) if not given.
        held_out: draw from the compositions that are kept out of training instead of from the others.
        twins: draw two objects of one colour and shape, which no prompt asks for.

    Returns:
        A scene whose objects do not overlap and differ in colour or shape, unless they are twins.

    Raises:
        InputError: if ``objects`` is neither 1 nor 2.
    """
    if objects not in (None, 1, 2):
        raise InputError(f"A scene has 1 or 2 objects, not {objects!r}.")
    if twins and (held_out or objects == 1):
        raise InputError(
            "Twins are two objects of a pair that occurs in training: leave held_out and objects."
        )
    while True:
        count = objects or (2 if rng.random() < 2 / 3 else 1)
        if twins:
            scene = _draw(rng, _draw_pairs(rng, 1) * 2)
        else:
            scene = _draw_held_out(rng, count) if held_out else _draw(rng, _draw_pairs(rng, count))
        if scene.held_out == held_out:
            return scene


def sample_wording(rng: np.random.Generator) -> Wording:
    """Draw how many words to spend on a scene, as the training prompts do."""
    says_sizes, says_ground, places = rng.random(3)
    style = "none" if places < 0.7 else "each" if places < 0.9 else "relation"
    return Wording(sizes=bool(says_sizes < 0.6), ground=bool(says_ground < 0.6), places=style)


def _draw_pairs(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    codes = rng.choice(len(COLOURS) * len(SHAPES), size=count, replace=False)
    return [(COLOURS[code // len(SHAPES)], SHAPES[code % len(SHAPES)]) for code in codes]


def _draw_held_out(rng: np.random.Generator, count: int) -> Scene:
    if count == 2 and rng.random() < 0.5:
        combinations = sorted(sorted(pairs) for pairs in HELD_OUT_COMBINATIONS)
        pairs = combinations[rng.integers(len(combinations))]
    else:
        held = sorted(HELD_OUT_PAIRS)
        pairs = [held[rng.integers(len(held))]]
        pairs += [pair for pair in _draw_pairs(rng, 2) if pair != pairs[0]][: count - 1]
    order = rng.permutation(len(pairs))
    return _draw(rng, [pairs[index] for index in order])


def _draw(rng: np.random.Generator, pairs: list[tuple[str, str]]) -> Scene:
    if len(pairs) == 1:
        places = [PLACES[rng.integers(len(PLACES))]]
    else:
        places = list((("left", "right"), ("top", "bottom"))[rng.integers(2)])
        places = places[:: 1 if rng.random() < 0.5 else -1]
    things = tuple(
        _draw_thing(rng, pair, place, len(pairs)) for pair, place in zip(pairs, places, strict=True)
    )
    return Scene(things, GROUNDS[rng.integers(2)])


def _draw_thing(rng: np.random.Generator, pair: tuple[str, str], place: str, count: int) -> Thing:
    size = SIZES[rng.integers(2)]
    radius = float(rng.uniform(*RADII[size]))
    margin = REACH * radius + 0.4
    near = (margin, SIDE / 2 - margin) if count == 2 else (margin, SIDE / 2 - 8)
    near = (near[0], max(near))
    along = float(rng.uniform(*near))
    across = float(rng.uniform(SIDE / 2 - 6, SIDE / 2 + 6))
    middle = float(rng.uniform(SIDE / 2 - 3, SIDE / 2 + 3))
    centre = {
        "left": (along, across),
        "right": (SIDE - along, across),
        "top": (across, along),
        "bottom": (across, SIDE - along),
        "middle": (middle, float(rng.uniform(SIDE / 2 - 3, SIDE / 2 + 3))),
    }[place]
    return Thing(*pair, size=size, centre=centre, radius=radius, place=place)
