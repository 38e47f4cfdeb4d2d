"""Observers that know nothing of the tracer: what a run did, and what was left on the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack

HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
)


def as_bytes(value: Any) -> Any:
    """Spell a value so that equality means the same bytes, shapes and types: NaN is NaN, 0 is not −0."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return ("tensor", tuple(value.shape), value.dtype, flat.numpy().tobytes())
    if isinstance(value, np.ndarray):
        return ("array", value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, Image.Image):
        return ("image", value.size, value.mode, value.tobytes())
    if isinstance(value, dict):
        return {key: as_bytes(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_bytes(item) for item in value]
    return value


@contextmanager
def latents_of(pipeline: Any) -> Iterator[list[Any]]:
    """Keep the latents that every ``scheduler.step`` returns, as bytes."""
    scheduler = pipeline.scheduler
    step = scheduler.step
    seen: list[Any] = []

    @wraps(step)  # a pipeline hands the generator only to a step whose signature names it
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        seen.append(as_bytes(result[0] if isinstance(result, tuple) else result.prev_sample))
        return result

    scheduler.step = watched
    try:
        yield seen
    finally:
        del scheduler.step


@contextmanager
def forwards_of(module: nn.Module) -> Iterator[list[int]]:
    """Count how often a module's real ``forward`` runs: one item a run, the rows of its input."""
    kind = type(module)
    forward = kind.forward
    seen: list[int] = []

    @wraps(forward)
    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is module:
            sample = args[0] if args else next(iter(kwargs.values()))
            seen.append(sample.shape[0])
        return forward(self, *args, **kwargs)

    kind.forward = counted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        kind.forward = forward  # type: ignore[method-assign]


def footprint(pipeline: Any) -> dict[str, Any]:
    """Spell everything a tracer might leave behind: hooks, shadowed methods, attributes, torch's own state.

    Two footprints are equal when nothing has come and nothing has gone. Run the pipeline once before
    taking one, as pipelines set attributes of their own.
    """
    found: dict[str, Any] = {
        "pipeline": _attributes(pipeline),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "modes": list(_get_current_function_mode_stack()),
        "global hooks": [
            list(table)
            for name, table in vars(torch_module).items()
            if name.startswith("_global") and isinstance(table, dict)
        ],
    }
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            for path, module in part.named_modules(prefix=name):
                found[path] = _attributes(module)
                found[f"{path} hooks"] = {
                    table: [(key, id(hook)) for key, hook in getattr(module, table).items()]
                    for table in HOOK_TABLES
                }
        elif part is not None:
            found[name] = _attributes(part)
    return found


def _attributes(thing: Any) -> dict[str, int | None]:
    """Name a thing's own attributes, with the identity of those that are called."""
    return {
        name: id(value) if callable(value) and not isinstance(value, (type, nn.Module)) else None
        for name, value in vars(thing).items()
    }
