"""Attention maps of a run: how much each place of the image attends to each token of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    layers: dict[str, torch.Tensor]
    rows: Sequence[Row]
    words: Sequence[Word]

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
        call = self._call(step)
        if layer is not None and layer not in self.layers:
            raise UnknownNameError(f"No attention map of {layer!r}.{nearest(layer, self.layers)}")
        chosen = [layer] if layer is not None else list(self.layers)
        maps = [as_image(self.layers[name][call, columns].sum(0), size) for name in chosen]
        finest = max((tuple(each.shape) for each in maps), key=lambda shape: shape[0] * shape[1])
        return torch.stack([resize(each, finest) for each in maps]).mean(0)

    def _call(self, step: int) -> int:
        calls = [index for index, row in enumerate(self.rows) if row.step == step]
        if not calls:
            last = max((row.step for row in self.rows), default=-1)
            raise InputError(f"No attention was kept at step {step}; there is from 0 to {last}.")
        return calls[-1]


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
