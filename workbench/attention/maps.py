"""Attention maps of a run: how much each place of the image attends to each token of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from workbench.attention.geometry import grid
from workbench.attention.words import Word, find
from workbench.errors import InputError, UnknownNameError, nearest
from workbench.tracing.ledger import Row


@dataclass(frozen=True)
class AttentionMaps:
    """Head-mean attention from image to text.

    Attributes:
        layers: by module path, the weights ``(calls, tokens, queries)``; over all tokens they sum to 1
            for each query (in joint attention together with the image's own keys).
        rows: the ledger rows of the calls.
        words: the words along the token axis.
        layer_rows: the rows of a layer that did not run in all of these calls: of two denoisers that
            take turns, each has its own.
    """

    layers: dict[str, torch.Tensor]
    rows: Sequence[Row]
    words: Sequence[Word]
    layer_rows: Mapping[str, Sequence[Row]] = field(default_factory=dict)

    def rows_of(self, layer: str) -> Sequence[Row]:
        """Return the ledger rows of one layer's calls."""
        return self.layer_rows.get(layer, self.rows)

    def map(
        self, word: str | int, *, step: int, size: tuple[int, int], layer: str | None = None
    ) -> torch.Tensor:
        """Return one word's map at one step.

        Args:
            word: the word, or its place in ``words``; a word of several tokens has their sum.
            step: which step.
            size: ``(width, height)`` of the image, whose shape says how the queries lie.
            layer: one attention module's path; None is the mean over all, each brought to the finest.

        Returns:
            Weights in [0, 1], ``(rows, columns)``.

        Raises:
            UnknownNameError: no such word or layer.
            InputError: no such step.
        """
        columns = list(find(self.words, word).columns)
        if layer is not None and layer not in self.layers:
            raise UnknownNameError(f"No attention map of {layer!r}.{nearest(layer, self.layers)}")
        chosen = [layer] if layer is not None else list(self.layers)
        calls = {name: self._calls(name, step) for name in chosen}
        if not any(calls.values()):
            kept = ", ".join(map(str, sorted({row.step for row in self.rows}))) or "none"
            raise InputError(f"No attention was kept at step {step}. Steps that were kept: {kept}.")
        maps = [
            as_image(self.layers[name][found[-1], columns].sum(0), size)
            for name, found in calls.items()
            if found
        ]
        finest = max((tuple(each.shape) for each in maps), key=lambda shape: shape[0] * shape[1])
        return torch.stack([resize(each, finest) for each in maps]).mean(0)

    def _calls(self, layer: str, step: int) -> list[int]:
        return [index for index, row in enumerate(self.rows_of(layer)) if row.step == step]


def as_image(weights: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Lay ``(queries,)`` out as the image's ``(rows, columns)``."""
    shape = grid(weights.shape[-1], *size)
    if shape is None:
        raise InputError(f"{weights.shape[-1]} queries do not lie on an image of {size[0]}×{size[1]}.")
    return weights.float().reshape(shape)


def resize(image: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Resize ``(rows, columns)`` bilinearly."""
    if tuple(image.shape) == tuple(shape):
        return image
    return functional.interpolate(image[None, None], size=shape, mode="bilinear", align_corners=False)[0, 0]
