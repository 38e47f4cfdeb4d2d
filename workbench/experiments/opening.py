"""What a script must do to open a model as it is open here: its reference alone gives it as it was saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from workbench import zoo
from workbench.errors import InputError
from workbench.models.model import DiffusionModel


@dataclass(frozen=True)
class Opening:
    """How a model differs from what its reference gives.

    Attributes:
        dtype: of its weights, as code; empty for float32.
        device: where it is; empty for the processor.
        scheduler: the class and configuration of another scheduler than the saved one.
    """

    dtype: str = ""
    device: str = ""
    scheduler: tuple[str, dict[str, Any]] | None = None

    @classmethod
    def of(cls, model: DiffusionModel) -> Opening:
        """Return how an open model differs.

        Raises:
            InputError: it does in a way that a few lines do not make again.
        """
        if not model.reference or not isinstance(model.pipeline, DiffusionPipeline):
            return cls()
        parts = [each for each in model.components.values() if isinstance(each, nn.Module)]
        if any(getattr(each, "peft_config", None) for each in parts):
            raise InputError(
                "The model has adapters, which its name does not say. Fuse them (fuse_lora), save the whole "
                "with model.save_pretrained(folder), and open that folder."
            )
        weights = [weight for part in parts for weight in part.parameters() if weight.is_floating_point()]
        dtypes = {weight.dtype for weight in weights}
        devices = {weight.device.type for weight in weights}
        if len(dtypes) > 1 or len(devices) > 1:
            found = ", ".join(sorted(map(str, (*dtypes, *devices))))
            raise InputError(
                f"The model's parts are of several dtypes or on several devices: {found}. Make them one."
            )
        dtype, device = next(iter(dtypes), torch.float32), next(iter(devices), "cpu")
        return cls(
            "" if dtype == torch.float32 else str(dtype),
            "" if device == "cpu" else device,
            _other_scheduler(model),
        )


def _other_scheduler(model: DiffusionModel) -> tuple[str, dict[str, Any]] | None:
    """Return the scheduler's class and configuration, if they are not what was saved."""
    scheduler = getattr(model.pipeline, "scheduler", None)
    if scheduler is None:
        return None
    kind, config = type(scheduler), _own(scheduler.config)
    home = str(zoo.path(model.reference)) if model.reference in zoo.models() else model.reference
    try:
        saved = DiffusionPipeline.load_config(home)["scheduler"][1]
        same = (
            kind.__name__ == saved
            and _own(kind.from_pretrained(home, subfolder="scheduler").config) == config
        )
    except (OSError, KeyError, TypeError):
        same = False
    if same:
        return None
    if getattr(diffusers, kind.__name__, None) is not kind:
        raise InputError(
            f"The scheduler, {kind.__name__}, is not one of diffusers', so a script cannot make it."
        )
    return kind.__name__, config


def _own(config: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}
