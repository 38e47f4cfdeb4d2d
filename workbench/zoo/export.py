"""Pipelines as they are shipped: half as large as they were trained, and opened as if they were not."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


def export(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline as float16 safetensors that load as float32 when no type is asked for.

    Args:
        pipeline: what to save; it is left as it is.
        folder: where to.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            full = {key: value.detach().clone() for key, value in part.state_dict().items()}
            part.half().save_pretrained(folder / name)  # type: ignore[operator]
            part.float().load_state_dict(full)
        elif part is not None:
            part.save_pretrained(folder / name)
    pipeline.save_config(folder)
    for config in (folder / "model_index.json", *folder.glob("*/config.json")):
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)  # where the weights were that it began with
        if config.parent.name.startswith("text_encoder"):
            # transformers loads the type named here, diffusers float32: name float32, or they differ.
            settings["dtype"] = "float32"
        config.write_text(json.dumps(settings, indent=2) + "\n")
