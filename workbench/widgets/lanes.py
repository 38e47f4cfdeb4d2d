"""What the step scrubber shows of a run."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from workbench.models.decoding import Decoder, is_image_run, predicted
from workbench.tracing.record import Record
from workbench.widgets.pictures import png, tiles

X0, X0_LINEAR, LATENTS, NOISE = "predicted x₀", "predicted x₀ (linear)", "latents", "noise"

DECODING_BUDGET = 20.0
"""Seconds that decoding one run's predicted pictures may take before a linear map stands in."""


def lane(label: str, record: Record, decoder: Decoder) -> dict[str, Any]:
    """Return one lane of the scrubber: each kind's pictures by step, and the final image.

    A run that was stopped has the pictures it came to.
    """
    frames: dict[str, list[bytes]] = {}
    if is_image_run(record) and (found := predicted(decoder, record, DECODING_BUDGET)) is not None:
        pictures, decoded = found
        frames[X0 if decoded else X0_LINEAR] = [png(each) for each in pictures]
    for kind, name in ((LATENTS, "latents"), (NOISE, "noise_pred")):
        shown = [_signed(record, decoder, tick[name]) for tick in _step_ticks(record)]
        if shown and all(each is not None for each in shown):
            frames[kind] = [each for each in shown if each is not None]
    final = png(record.images[0]) if is_image_run(record) else None
    return {"label": label, "frames": frames, "final": final}


def step_rows(record: Record) -> list[dict[str, Any]]:
    """Return each step's number, timestep and noise level, as the scrubber writes them."""
    rows: dict[int, dict[str, Any]] = {}
    for row in record.ledger:
        rows.setdefault(row.step, {"step": row.step, "timestep": row.timestep, "sigma": row.sigma})
    return list(rows.values())


def change_curve(record: Record) -> list[float]:
    """Return how far each step moved the latents, as the root mean square of the change."""
    if record.initial is None:
        return []
    points = [record.initial, *(tick["latents"] for tick in _step_ticks(record))]
    pairs = pairwise(points)
    return [
        float((after - before).float().square().mean().sqrt())
        for before, after in pairs
        if after is not None and before is not None and after.shape == before.shape
    ]


def _step_ticks(record: Record) -> list[dict[str, torch.Tensor | None]]:
    last: dict[int, int] = {}
    for row in record.ledger:
        if row.tick < len(record.ticks):
            last[row.step] = row.tick
    return [record.ticks[tick] for tick in last.values()]


def _signed(record: Record, decoder: Decoder, latents: torch.Tensor | None) -> bytes | None:
    if latents is None:
        return None
    size = record.images[0].size if is_image_run(record) else (0, 0)
    spatial = decoder.unpack(latents[:1], size) if size != (0, 0) else latents[:1]
    return png(tiles(spatial[0])) if spatial.ndim == 4 else None
