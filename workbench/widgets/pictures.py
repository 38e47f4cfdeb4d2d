"""Pictures as the widgets take them: PNG bytes, and signed maps in colour."""

from __future__ import annotations

import functools
import io

import numpy as np
import torch
from PIL import Image

_MOST_CHANNELS = 4


def png(image: Image.Image) -> bytes:
    """Return a picture as PNG bytes, lossless."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def tiles(latents: torch.Tensor) -> Image.Image:
    """Return signed channels side by side, each pixel's colour its sign and size.

    Args:
        latents: ``(channels, rows, columns)``; of more than four channels, the four principal
            components are shown.

    Returns:
        The channels in a grid two wide; zero is the neutral middle of the colours, and one scale,
        the 99th percentile of the absolute value, holds for all.
    """
    values = _few_channels(latents.detach().float().cpu())
    limit = float(np.percentile(np.abs(values.numpy()), 99)) or 1.0
    indices = ((values / limit).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.int64).numpy()
    coloured = _diverging()[indices]
    if len(coloured) == 1:
        return Image.fromarray(coloured[0])
    if len(coloured) % 2:
        coloured = np.concatenate([coloured, np.full_like(coloured[:1], 255)])
    pairs = [np.concatenate(list(coloured[at : at + 2]), axis=1) for at in range(0, len(coloured), 2)]
    return Image.fromarray(np.concatenate(pairs, axis=0))


def _few_channels(latents: torch.Tensor) -> torch.Tensor:
    channels, rows, columns = latents.shape
    if channels <= _MOST_CHANNELS:
        return latents
    flat = latents.reshape(channels, -1)
    centred = flat - flat.mean(1, keepdim=True)
    directions = torch.linalg.svd(centred, full_matrices=False).U[:, :_MOST_CHANNELS]
    components: torch.Tensor = (directions.T @ centred).reshape(_MOST_CHANNELS, rows, columns)
    return components


@functools.cache
def _diverging() -> np.ndarray:
    """Return 256 colours from blue over near-white to red, ``(256, 3)`` uint8."""
    from plotly.colors import sample_colorscale

    scale = sample_colorscale("RdBu_r", [level / 255 for level in range(256)], colortype="tuple")
    return (np.array(scale) * 255).round().astype(np.uint8)
