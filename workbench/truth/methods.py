"""Which map of a word lies best on its object? Overlap and pointing by method, by layer and by step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from workbench.attention.maps import AttentionMaps, mean_map, resize
from workbench.attention.methods import daam
from workbench.attention.request import Attention
from workbench.experiments.metrics import iou
from workbench.models.model import DiffusionModel
from workbench.truth.masks import largest
from workbench.zoo import shapes

RAW, DAAM, CONCEPTS, UNIFORM, CENTRE = "raw weights", "DAAM", "ConceptAttention", "uniform", "centre"
BY_LAYER = f"{RAW}, "


@dataclass
class Scores:
    """Mean overlap and pointing of maps with the objects they name.

    A map becomes a mask by its largest values, as many as the true mask has pixels; the uniform map has none
    and is scored whole. Pointing asks whether the largest value lies on the object.

    Attributes:
        pictures: how many pictures were read and counted.
        found: by what made the map (a method, a layer, a step), each picture's IoU and 1 where it points
            right.
    """

    pictures: int = 0
    found: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, values: np.ndarray, mask: np.ndarray) -> None:
        """Score one map, ``(rows, columns)``, against a boolean mask of the same shape."""
        place = np.unravel_index(int(values.argmax()), values.shape)
        self.found[name].append((iou(largest(values, int(mask.sum())), mask), float(mask[place])))

    def mean(self, name: str) -> tuple[float, float]:
        """Return the mean IoU and the share that points right; zeros where nothing was counted."""
        both = np.array(self.found[name]).mean(0) if self.found.get(name) else (0.0, 0.0)
        return float(both[0]), float(both[1])

    def best(self, prefix: str) -> str:
        """Return which of the names that begin so has the largest IoU, without that beginning."""
        names = [name for name in self.found if name.startswith(prefix)]
        return max(names, key=lambda name: self.mean(name)).removeprefix(prefix)

    def __str__(self) -> str:
        """Return a line for each, the best first."""
        rows = sorted(((*self.mean(name), name) for name in self.found), reverse=True)
        width = max((len(name) for name in self.found), default=6)
        head = f"{self.pictures} pictures"
        lines = [f"{head:<{width}}  {'IoU':>6}  {'points':>6}"]
        return "\n".join([*lines, *(f"{name:<{width}}  {a:>6.3f}  {b:>6.0%}" for a, b, name in rows)])


def compare_methods(
    model: DiffusionModel,
    prompts: Sequence[str],
    word: str,
    *,
    concepts: Sequence[str],
    shape: str | None = None,
    **settings: Any,
) -> Scores:
    """Return how well each method's map of a word meets its object, over prompts with noise of their own.

    Args:
        model: a model of the shapes world.
        prompts: each names the word's object once.
        word: the word whose maps are scored.
        concepts: what the word competes with in ConceptAttention, the word among them.
        shape: the object's shape; None is the word itself.
        **settings: arguments of the runs.
    """
    probe, scores = model.concepts(concepts, **settings), Scores()
    for seed, prompt in enumerate(prompts):
        run = model.record(prompt, seed=seed, capture=[Attention(words=[word]), probe], **settings)
        image = run.images[0]
        masks = [thing.mask for thing in shapes.read(image).things if thing.shape == (shape or word)]
        if len(masks) != 1:
            continue
        scores.pictures += 1
        raw, of_concepts = run.attention
        for name, values in _maps(raw, of_concepts, word, image.size):
            scores.add(name, resize(values, (image.height, image.width)).numpy(), masks[0])
        rows, columns = np.indices(masks[0].shape)
        middle = [(each - 1) / 2 for each in masks[0].shape]
        scores.add(CENTRE, -((rows - middle[0]) ** 2 + (columns - middle[1]) ** 2), masks[0])
        share = float(masks[0].mean())
        scores.found[UNIFORM].append((share, share))
    return scores


def _maps(
    raw: AttentionMaps, concepts: AttentionMaps, word: str, size: tuple[int, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give each method's map: of all layers and steps, of each layer and of each step."""
    methods: dict[str, tuple[AttentionMaps, Callable[..., torch.Tensor]]] = {
        RAW: (raw, raw.map),
        DAAM: (raw, partial(daam, raw)),
        CONCEPTS: (concepts, concepts.map),
    }
    for name, (maps, made) in methods.items():
        yield name, made(word, size=size)
        for layer in maps.layers:
            yield f"{name}, {layer}", made(word, size=size, layer=layer)
        for step in maps.steps:
            yield f"step {step}, {name}", mean_map([made(word, size=size, step=step)])
