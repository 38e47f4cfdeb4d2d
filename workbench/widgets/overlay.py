"""Attention maps as the scrubber lays them over the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from workbench.attention.geometry import IMAGE_TO_TEXT, TEXT_TO_IMAGE, grid
from workbench.attention.maps import AttentionMaps, as_image, resize
from workbench.attention.words import Word

ALL_LAYERS = "all layers"
_FINEST = 64


def overlay(
    attention: AttentionMaps | Sequence[AttentionMaps], *, lane: int, size: tuple[int, int]
) -> dict[str, Any]:
    """Return what the scrubber's ``attention`` trait takes.

    Args:
        attention: of one run; of several the first that are of words over the whole picture.
        lane: which lane's image they lie on.
        size: ``(width, height)`` of the image.

    Returns:
        The layers (their mean first), the words (padding as one), and the maps as uint8
        ``(layers, steps, words, rows, columns)`` with one scale a layer and word; ``{}`` if no layer's
        queries lie on the image.
    """
    maps = next(filter(_are_of_words, attention if isinstance(attention, Sequence) else [attention]), None)
    if maps is None:
        return {}
    fitting = {
        name: each if "heads" in maps.reduced else each.mean(1)
        for name, each in maps.layers.items()
        if grid(each.shape[-1], *size) and len(each) == len(maps.rows)
    }
    if not fitting or not maps.words:
        return {}
    # A step of several calls shows its last, as `AttentionMaps.map` does.
    calls = list({row.step: call for call, row in enumerate(maps.rows)}.values())
    words = _chips(maps.words)
    shape = _finest(fitting, size)
    layers = [_by_step(each, calls, words, size, shape) for each in fitting.values()]
    stacked = torch.stack([torch.stack(layers).mean(0), *layers])
    scales = stacked.amax(dim=(1, 3, 4)).clamp(min=1e-8)
    data = (stacked / scales[:, None, :, None, None] * 255).round().clamp(0, 255).to(torch.uint8)
    return {
        "lane": lane,
        "layers": [ALL_LAYERS, *fitting],
        "tokens": [
            {"text": word.text, "index": index, "special": word.special} for index, word in enumerate(words)
        ],
        "shape": list(data.shape),
        "scales": scales.tolist(),
        "data": np.ascontiguousarray(data.numpy()).tobytes(),
    }


def _are_of_words(maps: AttentionMaps) -> bool:
    return maps.block in (IMAGE_TO_TEXT, TEXT_TO_IMAGE) and not maps.places and maps.top is None


def _chips(words: Any) -> list[Word]:
    """Return the words with all padding as one: its mass matters, its places do not."""
    padding = tuple(column for word in words if word.text == "padding" for column in word.columns)
    chips = [word for word in words if not (word.special and word.text == "padding")]
    return [*chips, Word("padding", padding, special=True)] if padding else chips


def _finest(layers: dict[str, torch.Tensor], size: tuple[int, int]) -> tuple[int, int]:
    shapes = [grid(each.shape[-1], *size) or (1, 1) for each in layers.values()]
    rows, columns = max(shapes, key=lambda shape: shape[0] * shape[1])
    shrink = max(rows / _FINEST, columns / _FINEST, 1.0)
    return max(round(rows / shrink), 1), max(round(columns / shrink), 1)


def _by_step(
    maps: torch.Tensor, calls: list[int], words: list[Word], size: tuple[int, int], shape: tuple[int, int]
) -> torch.Tensor:
    """Return one layer's maps, ``(steps, words, rows, columns)``."""
    return torch.stack(
        [
            torch.stack(
                [resize(as_image(maps[call, list(word.columns)].sum(0), size), shape) for word in words]
            )
            for call in calls
        ]
    )
