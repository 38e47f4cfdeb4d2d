"""The shapes world in one place: draw scenes, render them, say them, read them back.

Example:
    >>> rng = numpy.random.default_rng(0)
    >>> scene = sample(rng)
    >>> scene.prompt()
    'a small blue cross and a large green triangle on a dark background'
    >>> str(read(render(scene)))
    'large green triangle and small blue cross on dark'
"""

from __future__ import annotations

from workbench.zoo.drawing import masks, render, render_many
from workbench.zoo.language import (
    COLOURS,
    GROUNDS,
    PLACES,
    SHAPES,
    SIZES,
    WORDS,
    Asked,
    AskedThing,
    Wording,
    describe,
    parse,
)
from workbench.zoo.reader import Found, Reading, read
from workbench.zoo.world import (
    GROUND_RGB,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_PAIRS,
    RADII,
    RGB,
    SIDE,
    Scene,
    Thing,
    sample,
    sample_wording,
)

__all__ = [
    "COLOURS",
    "GROUNDS",
    "GROUND_RGB",
    "HELD_OUT_COMBINATIONS",
    "HELD_OUT_PAIRS",
    "PLACES",
    "RADII",
    "RGB",
    "SHAPES",
    "SIDE",
    "SIZES",
    "WORDS",
    "Asked",
    "AskedThing",
    "Found",
    "Reading",
    "Scene",
    "Thing",
    "Wording",
    "describe",
    "masks",
    "parse",
    "read",
    "render",
    "render_many",
    "sample",
    "sample_wording",
]
