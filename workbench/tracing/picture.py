"""What a denoiser is told of the picture: the rows and columns of its latents, and how long its texts are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_SAMPLES = ("sample", "hidden_states", "x")


def picture_of(told: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the rows and columns of the latents, with the frames of a film before them; None if unknown.

    Args:
        told: what a denoiser is called with, by name. Where latents come as a sequence, what else it is told
            says how they lie: ``img_ids`` (Flux), ``img_shapes`` (Qwen), ``height`` and ``width`` (LTX).
    """
    sample: Any = next((told[name] for name in _SAMPLES if name in told), None)
    first = sample[0] if isinstance(sample, list) and sample else sample
    if not isinstance(first, torch.Tensor):
        return None
    if first is not sample or first.ndim in (4, 5):
        sides = first.shape[2 if first is sample else 1 :]
        return tuple(sides) if len(sides) in (2, 3) else None
    ids, shapes = told.get("img_ids"), told.get("img_shapes")
    if isinstance(ids, torch.Tensor) and ids.ndim in (2, 3) and ids.shape[-1] > 2:
        places = (ids if ids.ndim == 2 else ids[0]).cpu()
        # Pictures that are looked at come after the one that is made, under another number.
        own = places[places[:, 0] == places[0, 0]]
        return len(set(own[:, 1].tolist())), len(set(own[:, 2].tolist()))
    if shapes:
        while isinstance(shapes[0], (list, tuple)):
            shapes = shapes[0]
        return tuple(int(each) for each in shapes[-2:])
    film, height, width = (told.get(name) for name in ("num_frames", "height", "width"))
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return (film, height, width) if isinstance(film, int) else (height, width)


def texts_of(told: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the lengths of the texts that a denoiser is told, in tokens."""
    named = (value for name, value in told.items() if name.startswith("encoder_hidden_states"))
    return tuple(value.shape[1] for value in named if isinstance(value, torch.Tensor) and value.ndim == 3)
