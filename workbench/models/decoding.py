"""From latents to pictures, by the pipeline's own autoencoder where it has one."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from workbench.errors import UnknownNameError
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Record

_TOLERANCE = 3
"""How far, of 255, a decoded final picture may be from the pipeline's own: batching moves bytes by one."""


class Decoder:
    """Decodes latents to pictures, and knows whether it may.

    Pipelines differ in how they scale, shift and pack latents. A decoder is trusted with a pipeline
    once it has turned a run's final latents into that run's own image.
    """

    def __init__(self, model: DiffusionModel) -> None:
        self._model = model
        self._trusted: bool | None = None
        self.seconds = 0.0

    @property
    def refused(self) -> bool:
        """Whether a run has shown that its latents become pictures in another way."""
        return self._trusted is False

    def trusts(self, record: Record) -> bool:
        """Return whether the decoder gives this run's image from its final latents."""
        if self._trusted is None:
            self._trusted = self._agrees(record)
        return self._trusted

    def decode(self, latents: torch.Tensor, size: tuple[int, int]) -> list[Image.Image]:
        """Decode a batch of latents.

        Args:
            latents: as the scheduler has them, ``(batch, channels, rows, columns)`` or packed
                ``(batch, tokens, channels)``; without an autoencoder they are the picture itself, from -1
                to 1.
            size: ``(width, height)`` of the picture.

        Returns:
            One picture a row.
        """
        began = time.perf_counter()
        processor = getattr(self._model.pipeline, "image_processor", None) or VaeImageProcessor()
        with torch.no_grad():
            pixels = self._pixels(self.unpack(latents, size))
            pictures = processor.postprocess(pixels, output_type="pil")
        self.seconds = (time.perf_counter() - began) / max(len(pictures), 1)
        return list(pictures)

    def _pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Return ``(batch, 3, height, width)``, from -1 to 1."""
        vae = self._model.components.get("vae")
        if vae is None:
            if latents.ndim != 4 or latents.shape[1] not in (1, 3):
                raise ValueError(f"No picture has the shape {tuple(latents.shape)}.")
            return latents.detach().float().cpu()
        ready = latents.to(vae.device, vae.dtype) / getattr(vae.config, "scaling_factor", 1.0)
        pixels: torch.Tensor = vae.decode(
            ready + (getattr(vae.config, "shift_factor", None) or 0.0), return_dict=False
        )[0]
        return pixels

    def unpack(self, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return latents as ``(batch, channels, rows, columns)``, packed ones unpacked."""
        pipeline = self._model.pipeline
        if latents.ndim == 3 and hasattr(pipeline, "_unpack_latents"):
            width, height = size
            unpacked: torch.Tensor = pipeline._unpack_latents(
                latents, height, width, pipeline.vae_scale_factor
            )
            return unpacked
        return latents

    def _agrees(self, record: Record) -> bool:
        try:
            image = record.images[0]
            decoded = self.decode(record.latents[-1][:1], image.size)[0]
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            # Video, audio, pixel space, another packing: whatever it is, it is not for this decoder.
            return False
        if decoded.size != image.size:
            return False
        difference = np.asarray(decoded.convert("RGB"), np.int16) - np.asarray(image.convert("RGB"), np.int16)
        return bool(np.abs(difference).max() <= _TOLERANCE)


def fit_colours(latents: torch.Tensor, image: Image.Image) -> torch.Tensor:
    """Return the linear map from latent channels to RGB that fits one finished picture best.

    Args:
        latents: the final latents, ``(channels, rows, columns)``.
        image: the picture they became.

    Returns:
        Weights ``(channels + 1, 3)``, the last row the constant; RGB is in [0, 1].
    """
    channels, rows, columns = latents.shape
    small = torch.from_numpy(np.asarray(image.convert("RGB").resize((columns, rows)), np.float32) / 255)
    known = torch.cat([latents.float().reshape(channels, -1).T, torch.ones(rows * columns, 1)], 1)
    weights: torch.Tensor = torch.linalg.lstsq(known, small.reshape(-1, 3)).solution
    return weights


def paint(latents: torch.Tensor, colours: torch.Tensor) -> Image.Image:
    """Return latents ``(channels, rows, columns)`` as a small picture by a linear map of colours."""
    channels, rows, columns = latents.shape
    known = torch.cat([latents.float().reshape(channels, -1).T, torch.ones(rows * columns, 1)], 1)
    pixels = (known @ colours).clamp(0, 1).reshape(rows, columns, 3) * 255
    return Image.fromarray(pixels.round().to(torch.uint8).numpy())


def predicted(decoder: Decoder, record: Record, budget: float) -> tuple[Sequence[Image.Image], bool] | None:
    """Return the predicted clean picture of each step.

    Args:
        decoder: of the model.
        record: a run.
        budget: seconds that decoding may take; past it, pictures come from a linear map.

    Returns:
        The pictures and whether they are decoded (else linear); None where there are none.
    """
    if not len(record.ledger) or record.output is None or not decoder.trusts(record):
        return None
    x0 = record.pred_x0
    if x0 is None:
        return None
    size = record.images[0].size
    ticks = [record.ledger.last_tick(step) for step in range(record.ledger.steps)]
    if decoder.seconds * len(ticks) <= budget:
        return [decoder.decode(x0[tick][:1], size)[0] for tick in ticks], True
    final = decoder.unpack(record.latents[-1][:1], size)[0]
    colours = fit_colours(final, record.images[0])
    return [paint(decoder.unpack(x0[tick][:1], size)[0], colours) for tick in ticks], False


def is_image_run(record: Record) -> bool:
    """Whether the run returned pictures."""
    try:
        pictures = record.images
    except UnknownNameError:
        return False
    return isinstance(pictures, (list, tuple)) and bool(pictures) and isinstance(pictures[0], Image.Image)
