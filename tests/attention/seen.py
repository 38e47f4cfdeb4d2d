"""What attention layers give to the kernel, seen by a mode of the tests' own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tests import tiny
from workbench.attention.request import Attention
from workbench.models.model import DiffusionModel

KERNEL = functional.scaled_dot_product_attention
"""The kernel itself, whatever stands at its name."""


@dataclass
class Seen:
    """One call of the kernel: the layer it came from and what it was given."""

    path: str
    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None

    def weights(self) -> torch.Tensor:
        """Return the softmax as the kernel itself has it: values that are one-hot come out as weights."""
        batch, heads, keys, _ = self.key.shape
        one_hot = torch.eye(keys).expand(batch, heads, keys, keys)
        return KERNEL(self.query, self.key, one_hot, self.mask)


class Kernel(TorchFunctionMode):
    """Keeps what each attention layer of a denoiser gives to the kernel."""

    def __init__(self, pipeline, denoiser):
        super().__init__()
        self.path, self.calls = "", []
        self.hooks = []
        for path, module in pipeline.components[denoiser].named_modules(prefix=denoiser):
            if hasattr(module, "to_q"):
                self.hooks.append(module.register_forward_pre_hook(lambda *_, at=path: self.enter(at)))
        self.hooks.append(pipeline.components[denoiser].register_forward_hook(lambda *_: self.enter("")))

    def enter(self, path):
        self.path = path

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is KERNEL and self.path:
            given = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
            seen = Seen(self.path, given["query"].clone(), given["key"].clone(), given.get("attn_mask"))
            self.calls.append(seen)
        return func(*args, **kwargs)

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def of(self, path):
        return [call for call in self.calls if call.path == path]


def watched(name, **asked):
    case = tiny.FAMILIES[name]
    pipeline = case.build()
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    with Kernel(pipeline, denoiser) as kernel:
        record = DiffusionModel(pipeline).record(**case.arguments, seed=0, capture=[Attention(**asked)])
    return record, kernel
