"""What a script must do to open a model as it is open here: its reference alone gives it as it was saved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

from workbench.errors import InputError
from workbench.experiments.sampler import SchedulerSpec, other_scheduler
from workbench.models.model import DiffusionModel


@dataclass(frozen=True)
class Opening:
    """How a model differs from what its reference gives.

    Attributes:
        dtype: of its weights, as code; empty for float32.
        device: where it is; empty for the processor.
        scheduler: another scheduler than the saved one.
    """

    dtype: str = ""
    device: str = ""
    scheduler: SchedulerSpec | None = None

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
            other_scheduler(model),
        )
