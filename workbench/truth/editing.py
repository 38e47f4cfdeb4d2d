"""Does prompt-to-prompt keep the layout? IoU of an object before and after its colour's word is exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from workbench.experiments.editing import prompt_to_prompt
from workbench.experiments.metrics import iou
from workbench.models.model import DiffusionModel
from workbench.zoo import shapes
from workbench.zoo.reader import Found


@dataclass(frozen=True)
class Kept:
    """How far an object stays where it was, and whether it took the other colour.

    Attributes:
        edited: mean IoU of the object with the source's, under the source's attention.
        plain: of a plain change of the prompt.
        coloured: the share of edited pictures in which it has the other colour.
        coloured_plain: of the plain change.
        pictures: how many were read and counted.
    """

    edited: float
    plain: float
    coloured: float
    coloured_plain: float
    pictures: int

    def __str__(self) -> str:
        """Return the figures in a line."""
        return (
            f"IoU with where it was: prompt-to-prompt {self.edited:.3f}, plain change of the prompt "
            f"{self.plain:.3f}; in the other colour {self.coloured:.0%} and {self.coloured_plain:.0%} "
            f"({self.pictures} pictures)"
        )


def kept_places(
    model: DiffusionModel,
    source: str,
    target: str,
    *,
    shape: str,
    colour: str,
    seeds: Sequence[int],
    cross: float = 0.8,
    own: float = 0.4,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
) -> Kept:
    """Return how well an object keeps its place when one word of its prompt is exchanged.

    Args:
        model: a model of the shapes world.
        source: a prompt.
        target: the prompt with the other word.
        shape: the object's shape, which both name once.
        colour: the colour that the target names for it.
        seeds: each gives one source, one edit and one plain run.
        cross: share of the steps in which attention to the words is the source's.
        own: share in which that of the image to itself is.
        num_inference_steps: steps of each run.
        guidance_scale: guidance of each run.
    """
    settings: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    found: list[tuple[float, float, bool, bool]] = []
    for seed in seeds:
        run = model.record(source, seed=seed, **settings)
        edited = prompt_to_prompt(run, target, cross=cross, own=own)
        plain = model.record(target, seed=seed, **settings)
        before = _thing(run.images[0], shape)
        if before is None:
            continue
        there, elsewhere = (_thing(each.images[0], shape) for each in (edited, plain))
        found.append(
            (
                0.0 if there is None else iou(there.mask, before.mask),
                0.0 if elsewhere is None else iou(elsewhere.mask, before.mask),
                there is not None and there.colour == colour,
                elsewhere is not None and elsewhere.colour == colour,
            )
        )
    means = [float(each) for each in (np.mean(found, axis=0) if found else np.zeros(4))]
    return Kept(means[0], means[1], means[2], means[3], len(found))


def _thing(image: Image.Image, shape: str) -> Found | None:
    things = [thing for thing in shapes.read(image).things if thing.shape == shape]
    return things[0] if len(things) == 1 else None
