"""How a model's text encoders read a prompt, as attention sees it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from workbench.attention.words import Reading
from workbench.models.model import DiffusionModel


def readings(model: DiffusionModel, prompt: str, arguments: Mapping[str, Any]) -> list[Reading]:
    """Return what each encoder is given of a prompt.

    Args:
        model: whose.
        prompt: one prompt.
        arguments: of the pipeline's call, which may say how long texts are.
    """
    own = inspect.signature(model.pipeline).parameters.get("max_sequence_length")
    limit = arguments.get("max_sequence_length", None if own is None else own.default)
    read = model.words(prompt, max_sequence_length=limit)
    return [Reading(each.ids, model.components[name]) for name, each in read.items()]
