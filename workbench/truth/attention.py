"""Does a word's attention lie where its object is? Mean IoU with the object's mask, beside baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workbench.attention.maps import resize
from workbench.attention.request import Attention
from workbench.models.model import DiffusionModel
from workbench.zoo import shapes


@dataclass(frozen=True)
class Overlap:
    """Mean intersection over union with the objects' masks.

    Attributes:
        word: of the word's attention.
        uniform: of a map that is the same everywhere, which is to say of the whole image.
        centre: of a blob in the middle.
        pictures: how many pictures were read and counted.
    """

    word: float
    uniform: float
    centre: float
    pictures: int

    def __str__(self) -> str:
        """Return the figures in a line."""
        return (
            f"IoU of the word's attention {self.word:.3f}, of a uniform map {self.uniform:.3f}, "
            f"of a centred blob {self.centre:.3f} ({self.pictures} pictures)"
        )


def word_overlap(
    model: DiffusionModel,
    prompts: Sequence[str],
    word: str,
    *,
    steps: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
) -> Overlap:
    """Return how well a word's attention meets its object over prompts, each with its own noise.

    A map becomes a mask by its largest values, as many as the true mask has pixels: every method is
    scored at the same area, so that none wins by being large. The uniform map has no largest values
    and is scored whole.

    Args:
        model: a model of the shapes world.
        prompts: each names the word's object once.
        word: a shape's name.
        steps: over which steps the maps are averaged; None is all.
        layers: attention layers; None is all that attend to text.
        num_inference_steps: steps of each run.
        guidance_scale: guidance of each run.
    """
    found: list[tuple[float, float, float]] = []
    for seed, prompt in enumerate(prompts):
        record = model.record(
            prompt,
            seed=seed,
            capture=[Attention(sites=layers, steps=steps)],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        image = record.images[0]
        masks = [thing.mask for thing in shapes.read(image).things if thing.shape == word]
        if len(masks) != 1:
            continue
        kept = sorted({row.step for row in record.attention.rows})
        maps = [record.attention.map(word, step=step, size=image.size) for step in kept]
        whole = resize(torch.stack(maps).mean(0), (image.height, image.width)).numpy()
        found.append((iou(largest(whole, masks[0].sum()), masks[0]), *_baselines(masks[0])))
    means = np.mean(found, axis=0) if found else np.zeros(3)
    return Overlap(float(means[0]), float(means[1]), float(means[2]), len(found))


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


def _baselines(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.indices(mask.shape)
    distance = (rows - (mask.shape[0] - 1) / 2) ** 2 + (columns - (mask.shape[1] - 1) / 2) ** 2
    return iou(np.ones_like(mask), mask), iou(largest(-distance, mask.sum()), mask)
