"""DAAM: the attention that a word gets over all layers, heads and steps, as a map of the picture."""

from __future__ import annotations

import torch

from workbench.attention.geometry import IMAGE_TO_TEXT
from workbench.attention.maps import Asked, AttentionMaps, as_image, resize
from workbench.attention.words import find
from workbench.errors import InputError


def daam(
    maps: AttentionMaps,
    word: Asked,
    *,
    size: tuple[int, int],
    layer: str | None = None,
    step: int | None = None,
) -> torch.Tensor:
    """Return a word's map by DAAM (Tang et al., 2023, arXiv:2210.04885).

    Every layer's map of every step is brought to the picture's size bicubically, what falls below zero by it
    is cut off, and their mean is taken. The original sums over heads where this takes the mean, which is the
    same picture.

    Args:
        maps: of ``image->text``, of all layers and steps that are to count, heads reduced or not.
        word: the word or phrase; of several tokens the mean, as in the original.
        size: ``(width, height)`` of the image.
        layer: one layer's alone, by its path; None is all.
        step: one step's alone; None is all.

    Returns:
        Weights, ``(height, width)`` float32.

    Raises:
        UnknownNameError: no such word or layer.
        InputError: another block was kept, no such step, or no attention at all.
    """
    if not isinstance(maps, AttentionMaps):
        raise InputError(f"DAAM is of maps, not of {type(maps).__name__}. Give record.attention.")
    if maps.block != IMAGE_TO_TEXT:
        raise InputError(f"DAAM is of 'image->text'; these maps are of {maps.block!r}.")
    columns, whole = list(find(maps.words, word).columns), (size[1], size[0])
    found = [
        resize(as_image(each[columns].float().mean(0), size), whole, "bicubic").clamp(min=0)
        for name, calls in maps.chosen(layer, step)
        for each in _without_heads(maps, maps.layers[name][calls])
    ]
    return torch.stack(found).mean(0)


def _without_heads(maps: AttentionMaps, weights: torch.Tensor) -> torch.Tensor:
    return weights if "heads" in maps.reduced else weights.float().mean(1)
